"""`stackwise demo`: the preset of that name, explained on the way, and its controls."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.options import RUNS, Overrides, Threads, load_config
from stackwise.cli.output import next_steps, note, print_table
from stackwise.cli.runs import VALIDATION_COLUMNS, validation_table
from stackwise.cli.train import choose_sinks

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

PRESET = "demo"


def demo(
    overrides: Overrides = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also train two controls with the same compute: the final model end to end, and the first "
            "stage's model without growth. Takes three times as long.",
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run folders.")
    ] = RUNS,
    plain: Annotated[
        bool, typer.Option("--plain", help="One line per event, as in a pipe; no live display.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Watch a language model grow from 1 to 4 stacks on real text, in about two minutes on two cores.

    The text is that of your Python's own standard library, so nothing is downloaded. Each new stack is trained on top
    of a frozen trunk; at the end all stacks are tuned together. The run goes to DIR/demo: an earlier demo there is
    replaced, an interrupted one is continued.

    \b
    Examples:
      stackwise demo
      stackwise demo --compare
      stackwise demo training.max_steps=20 --out /tmp/runs
    """
    settings = load_config(PRESET, [*(overrides or ()), f"checkpoint.dir={out}"])
    grown = _grow(settings, plain, again=_again(overrides, compare, out))
    _show(grown)
    if compare:
        _compare(grown, plain)
    _what_next(grown)


@dataclass(frozen=True)
class Outcome:
    """A finished run, and the processor time it took (null when it was continued and only a part was seen)."""

    label: str
    folder: Path
    result: dict[str, Any]
    cpu_seconds: float | None


def _grow(settings: StackWiseConfig, plain: bool, again: str) -> Outcome:
    from stackwise.training.errors import IncompatibleResumeError, Interrupted

    checkpoint = settings.checkpoint
    checkpoint.resume = "auto"
    checkpoint.overwrite = not _was_interrupted(Path(checkpoint.dir) / settings.training.run_id)
    try:
        try:
            return _train("grown stack by stack", settings, plain)
        except IncompatibleResumeError:
            note("the interrupted demo had other settings; starting a new one")
            checkpoint.overwrite = True
            return _train("grown stack by stack", settings, plain)
    except Interrupted as error:
        raise Interrupted(error.signum, f"{error}. To continue:\n  {again}") from None


def _was_interrupted(path: Path) -> bool:
    """Whether the folder holds a run that did not come to its end, and can."""
    from stackwise.tracking.folder import RunFolder
    from stackwise.tracking.history import RunHistory
    from stackwise.tracking.metrics import read_metrics

    folder = RunFolder(path)
    if not folder.metrics.exists():
        return False
    history = RunHistory.from_events(read_metrics(folder.metrics, strict=False).events)
    return history.status in ("stopped", "unfinished")


def _train(label: str, settings: StackWiseConfig, plain: bool) -> Outcome:
    from stackwise.training.run import train

    before = time.process_time()
    result = train(settings, sinks=choose_sinks(False, plain), report=False)
    spent = time.process_time() - before
    return Outcome(label, Path(result["run_dir"]), result, None if result["resumed_from"] else spent)


def _show(grown: Outcome) -> None:
    from stackwise.tracking.folder import RunFolder
    from stackwise.tracking.history import RunHistory
    from stackwise.tracking.metrics import read_metrics
    from stackwise.tracking.report import build_report
    from stackwise.tracking.units import printable

    folder = RunFolder(grown.folder)
    build_report(folder.path)
    history = RunHistory.from_events(read_metrics(folder.metrics).events)
    print()
    print_table(
        "The model as it grew",
        VALIDATION_COLUMNS,
        validation_table(history),
        caption="Validation loss in nats per token (here a token is a byte), on files that were held out.",
    )
    if folder.sample.exists():
        print("\nA sample from the finished model:\n")
        for line in printable(folder.sample.read_text("utf-8")).rstrip().splitlines():
            print(f"    {line}")


def _compare(grown: Outcome, plain: bool) -> None:
    """Train the two controls with the floating-point operations of the grown run, and show all three."""
    outcomes = [grown]
    for label, name, only_first in (
        ("final model, end to end", "end-to-end", False),
        ("first stage's model, no growth", "shallow", True),
    ):
        settings = control(grown, name, only_first=only_first)
        print(f"\nControl: {label}, {settings.training.max_steps} steps")
        outcomes.append(_train(label, settings, plain))
    from stackwise.tracking import units

    rows = []
    for outcome in outcomes:
        result = outcome.result
        peak = max(stage["bytes"]["peak"] for stage in result["training_history"])
        rows.append(
            [
                outcome.label,
                units.count(result["architecture"]["params"]),
                units.loss(result["eval_loss"]),
                units.flops(result["flops"]),
                units.count(result["tokens"]),
                "-" if outcome.cpu_seconds is None else f"{outcome.cpu_seconds:.0f}",
                units.size(peak),
            ]
        )
    print()
    print_table(
        "The same compute, spent in three ways",
        ["model", "weights", "validation loss", "compute", "tokens", "CPU seconds", "peak memory"],
        rows,
        caption="Same data, seed, batch and optimizer settings, none of them tuned for the controls; one run each. CPU "
        "seconds include evaluation and saving. Peak memory: counted bytes of weights, gradients, moments and "
        "activations in the most demanding stage.",
    )
    if grown.cpu_seconds is None:
        note("the grown run was continued after an interruption, so its CPU seconds are not known")


def control(grown: Outcome, name: str, *, only_first: bool) -> StackWiseConfig:
    """A run that trains everything end to end and costs what the grown run cost, to within half a step.

    The model is the grown run's final rack, or with `only_first` that of its first stage. Blocks between the last stack
    and the head count as ordinary ones, which is what they are.
    """
    from stackwise.config.root import StackWiseConfig
    from stackwise.curriculum.costs import stage_flops
    from stackwise.curriculum.curricula import stages
    from stackwise.planning.budget import nearest

    base = StackWiseConfig.from_yaml(grown.folder / "config.yaml")
    settings = base.to_dict()
    training, shape = settings["training"], settings["model"]["architecture"]
    tail = training["progressive"]["global_head_blocks"]
    n_stacks = 1 if only_first else grown.result["architecture"]["n_stacks"]
    shape.update(n_stacks=1, blocks_per_stack=n_stacks * shape["blocks_per_stack"] + tail)
    training.update(
        run_id=f"{training['run_id']}-{name}",
        progressive={"enabled": False},
        new_stack_lr=None,
        trunk_lr=None,
        max_steps=1,
    )
    settings["checkpoint"].update(overwrite=True, resume="auto")
    config = StackWiseConfig.from_dict(settings)
    (step,) = stage_flops(config, stages(config))
    config.training.max_steps = nearest(lambda steps: steps * step, grown.result["flops"])
    return config


def _what_next(grown: Outcome) -> None:
    run = shlex.quote(str(grown.folder))
    print(f"\nRun     {grown.folder}")
    print(f"Report  {grown.folder / 'report.html'}")
    next_steps(
        more_text=f"stackwise generate {run} --prompt 'import '",
        a_prompt_loop=f"stackwise chat {run}",
        your_own_settings=f"stackwise config show {PRESET} --source > my.yaml",
        your_own_text="stackwise train my.yaml training.run_id=mine data.source=text data.path=my.txt",
    )


def _again(overrides: list[str] | None, compare: bool, out: Path) -> str:
    words = ["stackwise", "demo", *(overrides or ())]
    if compare:
        words.append("--compare")
    if out != RUNS:
        words += ["--out", str(out)]
    return shlex.join(words)
