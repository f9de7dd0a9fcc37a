"""`stackwise generate`, and the sampling options that `chat` takes too."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.denoise import (
    BlockLength,
    Grid,
    Sampler,
    Steps,
    Threshold,
    Watch,
    fill_gaps,
    refuse_options,
)
from stackwise.cli.errors import UsageError
from stackwise.cli.options import Run, Strict, Threads, find_run
from stackwise.cli.output import watch_folders
from stackwise.config.errors import ConfigError

if TYPE_CHECKING:
    from stackwise.inference.settings import GenerationSettings
    from stackwise.training.stored import OpenRun

MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", metavar="N", help="Longest continuation, in tokens.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", metavar="T", help="Divides the logits; 0 is greedy.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="K", help="Sample from the K likeliest tokens; 0 is off.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help="Sample from the smallest set that holds P; 1 is off."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", metavar="R", help="Make tokens already there less likely; 1 is off."
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="TEXT", help="End the continuation at this text; may be given several times."
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", "-s", metavar="N", help="The same seed gives the same text.")
]
Greedy = Annotated[
    bool, typer.Option("--greedy", help="Always take the likeliest token, as --temperature 0.")
]


def generate(
    run: Run,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What to continue or fill; - reads it from standard input. Without it: `tracking.sample_prompt` of the run.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = None,
    greedy: Greedy = False,
    sampler: Sampler = None,
    steps: Steps = None,
    grid: Grid = None,
    block_length: BlockLength = None,
    threshold: Threshold = None,
    watch: Watch = False,
    strict: Strict = False,
    threads: Threads = None,
) -> None:
    """Continue a prompt with the model of a run, or fill the gaps of a text.

    The prompt is printed first. Options that are not given are those of the run's configuration (`generation.*`).
    A run that is still training can be read: its newest checkpoint is used.

    A model trained by masked diffusion (or mlm) continues a prompt by masked tokens, which it fills in any order. In a
    text with gaps, [MASK] for one token and [MASK:12] for twelve, it fills those. What it took is told on standard
    error.

    \b
    Examples:
      stackwise generate runs/demo --prompt 'def '
      stackwise generate demo -p 'import ' -n 500 -t 0.7 --top-p 0.95 --seed 3
      stackwise generate demo -p 'class ' --greedy --stop $'\\n\\n'
      head -c 200 my.txt | stackwise generate mine --prompt -
      stackwise generate diffused -p 'def [MASK:20]:' --sampler threshold --threshold 0.8 --watch
    """
    path = find_run(run)
    watch_folders((path, path / "store"), strict)
    text = _from_stdin() if prompt == "-" else prompt
    from stackwise.training.stored import open_run

    opened = open_run(path)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
        "sampler": sampler,
        "steps": steps,
        "grid": grid,
        "block_length": block_length,
        "threshold": threshold,
    }
    start = opened.config.tracking.sample_prompt if text is None else text
    refuse_options(opened, options, watch, start)
    settings = sampling(opened, options, greedy)
    rack = on_best_device(opened)
    if not rack.is_causal:
        fill_gaps(opened, start, settings, watch)
        return
    from stackwise.inference.text import complete

    write = writer()
    opened.tokenizer.encode(start)  # a character that it lacks is told before anything is printed
    write(start)
    completion = complete(rack, opened.tokenizer, start, settings, write)
    print()
    if sys.stderr.isatty():
        speed = f"{completion.tokens_per_second:,.0f} tokens/s, ended by {completion.reason}"
        print(typer.style(f"({len(completion.tokens)} tokens, {speed})", dim=True), file=sys.stderr)


def sampling(opened: OpenRun, options: dict[str, Any], greedy: bool) -> GenerationSettings:
    """The run's `generation` settings with the options that were given; a wrong one is a ConfigError naming it."""
    if greedy and options["temperature"] not in (None, 0):
        raise UsageError("--greedy is --temperature 0; leave one of the two out")
    settings = opened.config.generation.model_copy(deep=True)
    problems = []
    for name, value in {**options, **({"temperature": 0.0} if greedy else {})}.items():
        if value is None or value == []:
            continue
        try:
            setattr(settings, name, value)
        except ConfigError as error:
            option = "--" + name.replace("_", "-")
            problems += [replace(problem, key=option) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return settings


def on_best_device(opened: OpenRun) -> Any:
    """The rack on the device that `training.device: auto` would choose here."""
    from stackwise.training.device import pick_device

    return opened.rack.to(pick_device("auto"))


def writer() -> Any:
    """A function that shows pieces of text at once; in a terminal, control characters are written out."""
    from stackwise.tracking.units import printable

    in_terminal = sys.stdout.isatty()

    def write(piece: str) -> None:
        print(printable(piece) if in_terminal else piece, end="", flush=True)

    return write


def _from_stdin() -> str:
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt on standard input is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}; convert "
            "it, for example with `iconv -f latin1 -t utf-8`"
        ) from None
