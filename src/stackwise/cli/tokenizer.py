"""`stackwise tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Config, Overrides, load_config
from stackwise.cli.output import documents

app = typer.Typer(no_args_is_help=True, help="Train tokenizers.")


@app.command("train")
def train(
    config: Config,
    overrides: Overrides = None,
    vocab_size: Annotated[
        int,
        typer.Option("--vocab-size", "-v", metavar="N", help="Tokens, special ones included; at least 258."),
    ] = 4096,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write it.")] = Path(
        "tokenizer.json"
    ),
    min_frequency: Annotated[
        int,
        typer.Option(
            "--min-frequency", min=1, metavar="N", help="A pair must occur this often to be merged."
        ),
    ] = 2,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace FILE if it exists.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on the training text of a configuration.

    The held-out text is left out. The result is one tokenizer.json, which the `tokenizers` library and Transformers
    read too.

    \b
    Examples:
      stackwise tokenizer train demo --vocab-size 2048 --out python.json
      stackwise tokenizer train my.yaml data.source=text data.path=my.txt
      stackwise train my.yaml data.tokenizer=tokenizer.json
    """
    settings = load_config(config, overrides)
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; give another --out, or --force to replace it")
    from stackwise.data.prepare import train_tokenizer

    trained = train_tokenizer(settings.data, vocab_size, out, min_frequency=min_frequency)
    size = trained.tokenizer.vocab_size
    print(
        f"{trained.path}: {size:,} tokens from {trained.n_bytes:,} bytes of {documents(trained.n_documents)}"
    )
    if size < vocab_size:
        print(f"(fewer than {vocab_size:,}: no other pair occurs {min_frequency} times)")
    print(f"Use it: data.tokenizer={trained.path}")
