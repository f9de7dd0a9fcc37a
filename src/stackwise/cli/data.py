"""`stackwise data`."""

from __future__ import annotations

import typer

from stackwise.cli.options import Config, Json, Overrides, load_config
from stackwise.cli.output import documents, print_json

app = typer.Typer(no_args_is_help=True, help="Prepare training data.")


@app.command("prepare")
def prepare(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tokenize the text of a configuration into memory-mapped shards.

    `train` does this by itself. The same text and tokenizer give the same folder and the same hash; what is already
    there is checked and used.

    \b
    Examples:
      stackwise data prepare demo
      stackwise data prepare my.yaml data.source=jsonl data.path='corpus/*.jsonl' data.text_key=body
    """
    settings = load_config(config, overrides)
    from stackwise.config.resolve import resolve
    from stackwise.data.prepare import prepare as prepare_corpus

    data = resolve(settings)[0].data
    assert data.cache_dir is not None
    corpus = prepare_corpus(data, data.cache_dir)
    if as_json:
        print_json(
            {"folder": str(corpus.folder), "hash": corpus.hash, "reused": corpus.reused, **corpus.manifest}
        )
        return
    print(f"{corpus.folder}{' (was there already)' if corpus.reused else ''}")
    print(f"  tokenizer   {corpus.tokenizer.name}, {corpus.tokenizer.vocab_size:,} tokens")
    for split in (corpus.train, corpus.validation):
        print(
            f"  {split.name:<10}  {split.n_tokens:,} tokens of {split.n_bytes:,} bytes in "
            f"{documents(split.n_documents)}"
        )
    print(f"  hash        {corpus.hash}")
