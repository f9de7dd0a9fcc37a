"""`stackwise fill` and `stackwise embed`: what an encoder knows of a text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Run, Threads, find_run
from stackwise.cli.output import print_json, print_table

if TYPE_CHECKING:
    from stackwise.training.stored import OpenRun


def fill(
    run: Run,
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT", help="A text with [MASK] where a token is missing; [MASK:3] for three."
        ),
    ],
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Candidates for every gap.")] = 5,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Show the likeliest tokens for the gaps of a text, with their probabilities.

    Every gap is judged by itself. For a text filled as a whole, use `stackwise generate RUN --prompt TEXT`.

    \b
    Examples:
      stackwise fill runs/bert 'The [MASK] sat on the mat.'
      stackwise fill bert 'a [MASK:3] b' --top 10 --json
    """
    path = find_run(run)
    from stackwise.inference.encoder import fill as candidates
    from stackwise.inference.masked_text import gaps_in
    from stackwise.training.stored import open_run

    if not gaps_in(text):
        raise UsageError("TEXT has no gap; write [MASK] where a token is missing")
    opened = open_run(path)
    denoiser = _denoiser(opened, "fill")
    found = candidates(
        denoiser,
        opened.tokenizer,
        text,
        top=top,
        max_length=opened.rack.spec.max_seq_len,
        device=opened.rack.device,
    )
    if as_json:
        print_json({"run": str(path), "text": text, "gaps": [[vars(c) for c in gap] for gap in found]})
        return
    from stackwise.tracking.units import printable

    for number, gap in enumerate(found, 1):
        title = f"gap {number} of {len(found)}" if len(found) > 1 else ""
        rows = [(repr(printable(c.token)), f"{c.probability:.4f}") for c in gap]
        print_table(title, ["token", "probability"], rows)


def embed(
    run: Run,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="One vector is given for each.")],
    similarity: Annotated[
        bool,
        typer.Option("--similarity", help="Print the cosine of every two texts in place of the vectors."),
    ] = False,
    threads: Threads = None,
) -> None:
    """Print a vector for every text: the mean of the final hidden states of its tokens, as lines of JSON.

    \b
    Examples:
      stackwise embed runs/bert 'a cat sat' 'a dog lay' > vectors.jsonl
      stackwise embed bert 'a cat sat' 'a dog lay' 'two and two' --similarity
    """
    path = find_run(run)
    from stackwise.inference.encoder import cosines
    from stackwise.inference.encoder import embed as vectors_of
    from stackwise.training.stored import open_run

    opened = open_run(path)
    denoiser = _denoiser(opened, "embed")
    vectors = vectors_of(
        denoiser,
        opened.tokenizer,
        texts,
        max_length=opened.rack.spec.max_seq_len,
        device=opened.rack.device,
    )
    if not similarity:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            print(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False))
        return
    numbers = [str(i) for i in range(1, len(texts) + 1)]
    rows = [
        [f"{number} {text[:40]!r}", *(f"{value:.3f}" for value in row)]
        for number, text, row in zip(numbers, texts, cosines(vectors).tolist(), strict=True)
    ]
    print_table("cosine similarity", ["text", *numbers], rows)


def _denoiser(opened: OpenRun, verb: str) -> Any:
    """The run's model on the best device; a causal one is a UsageError."""
    from stackwise.cli.generate import on_best_device
    from stackwise.objectives.denoiser import denoiser_of

    if opened.rack.is_causal:
        raise UsageError(
            f"`stackwise {verb}` needs a model that sees both directions, and that of this run is causal; "
            "`stackwise generate` continues a text with it"
        )
    return denoiser_of(on_best_device(opened), opened.config, opened.tokenizer.special_ids)
