"""The part of `stackwise generate` that fills masked positions, and how it is watched."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from stackwise.inference.masked_text import OnPieces, Piece
    from stackwise.inference.settings import GenerationSettings
    from stackwise.training.stored import OpenRun

FRAME = 0.04
"""Seconds that every step stays on the screen at least, so that an eye can follow."""

Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        metavar="NAME",
        help="How masked positions are filled: ancestral, confidence, threshold, remask, unroll or stream.",
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", metavar="N", help="Steps of ancestral, confidence and remask.")
]
Grid = Annotated[
    str | None,
    typer.Option("--grid", metavar="NAME", help="Tokens per step: cosine (few at first) or linear."),
]
BlockLength = Annotated[
    int | None,
    typer.Option("--block-length", metavar="N", help="Fill in blocks of N positions, left to right."),
]
Threshold = Annotated[
    float | None,
    typer.Option("--threshold", metavar="P", help="Probability above which `threshold` fills a position."),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Show the text appear, step by step.")]

OWN = ("sampler", "steps", "grid", "block_length", "threshold")
"""Options of filling masked positions."""


def refuse_options(opened: OpenRun, options: dict[str, Any], watch: bool, text: str) -> None:
    """UsageError for options that this model, or this text, has no use for."""
    from stackwise.inference.masked_text import gaps_in

    names = [name for name, value in options.items() if value not in (None, [])]
    if opened.rack.is_causal:
        unfit = [name for name in names if name in OWN] + ["watch"] * watch
        reason = "the model of this run is causal and continues token by token"
    else:
        unfit = [name for name in names if name == "repetition_penalty"]
        reason = "the model of this run sees both directions and fills masked positions"
        if not unfit and gaps_in(text):
            unfit = [name for name in names if name in ("max_new_tokens", "stop")]
            reason = "the text has gaps, which are filled, and is not continued; end it with [MASK:50] for 50 more tokens"
    if unfit:
        listed = ", ".join("--" + name.replace("_", "-") for name in unfit)
        raise UsageError(f"{listed} cannot be used here: {reason}")


def fill_gaps(opened: OpenRun, text: str, settings: GenerationSettings, watch: bool) -> None:
    """Print the text with its gaps filled, or continued; what it took goes to standard error."""
    from stackwise.cli.output import console
    from stackwise.inference.masked_text import infill
    from stackwise.model.modes import eval_mode
    from stackwise.objectives.denoiser import denoiser_of

    rack = opened.rack
    with eval_mode(rack), _shown(watch) as on_step:
        done = infill(
            denoiser_of(rack, opened.config, opened.tokenizer.special_ids),
            opened.tokenizer,
            text,
            settings,
            max_length=rack.spec.max_seq_len,
            device=rack.device,
            on_step=on_step,
        )
    if sys.stdout.isatty():
        console().print(_painted(done.pieces), soft_wrap=True)
    else:
        print(done.text)
    print(done.result, file=sys.stderr)


@contextmanager
def _shown(watch: bool) -> Iterator[OnPieces | None]:
    """What shows each step: in place in a terminal, else as a line per step; both on standard error."""
    if not watch:
        yield None
        return
    if not sys.stderr.isatty():
        count = iter(range(sys.maxsize))
        yield lambda pieces: print(f"step {next(count)}: {_painted(pieces).plain}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True, highlight=False), transient=True, auto_refresh=False) as live:

        def show(pieces: Sequence[Piece]) -> None:
            live.update(_painted(pieces), refresh=True)
            time.sleep(FRAME)

        yield show


def _painted(pieces: Sequence[Piece]) -> Text:
    """The text with what is filled set off from what was given, and a light block for every masked token."""
    from rich.text import Text

    from stackwise.tracking.units import printable

    text = Text()
    for piece in pieces:
        if piece.kind == "masked":
            text.append("░" * piece.tokens, style="dim")
        else:
            text.append(printable(piece.text), style="bold green" if piece.kind == "filled" else "")
    return text
