"""`stackwise runs`: list, show, compare and remove run folders."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import RUNS, Json, Run, Runs, find_run, find_runs
from stackwise.cli.output import next_steps, note, print_json, print_table

if TYPE_CHECKING:
    from stackwise.tracking.folder import RunFolder
    from stackwise.tracking.history import RunHistory

app = typer.Typer(short_help="List, show, compare and remove runs.")

HINTS = {
    "done": "",
    "stopped": "stopped before the end",
    "failed": "ended with an error",
    "unfinished": "still training, or ended without a word",
}


@app.callback(invoke_without_command=True)
def runs(context: typer.Context) -> None:
    """List, show, compare and remove runs. Without a command: list those in ./runs.

    \b
    Examples:
      stackwise runs
      stackwise runs ls experiments
      stackwise runs show demo
      stackwise runs compare demo demo-end-to-end
      stackwise runs rm demo
    """
    if context.invoked_subcommand is None:
        ls()


@app.command("ls")
def ls(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the run folders are.")] = RUNS,
    as_json: Json = False,
) -> None:
    """List the runs in a folder, oldest first."""
    from stackwise.tracking import units
    from stackwise.tracking.folder import list_runs

    if not directory.exists() and directory == RUNS:
        found = []
    else:
        found = list_runs(directory)
    if as_json:
        print_json([{**vars(run), "path": str(run.path)} for run in found])
        return
    if not found:
        print(f"No runs in {directory}. `stackwise demo` makes one; `stackwise runs ls DIR` looks elsewhere.")
        return
    rows = [
        [
            run.path.name,
            run.status,
            units.steps(run.step) + (f"/{units.steps(run.total_steps)}" if run.total_steps else ""),
            "–" if run.n_stacks is None else str(run.n_stacks),
            units.loss(run.loss),
            units.loss(run.eval_loss),
            units.duration(run.seconds),
            units.size(run.size_bytes),
            _date(run.started),
        ]
        for run in found
    ]
    heads = ["run", "text:status", "steps", "stacks", "loss", "validation", "time", "disk", "started"]
    print_table("", heads, rows)
    for run in found:
        if run.damage:
            note(f"{run.path}: {run.damage}")


@app.command("show")
def show(run: Run, as_json: Json = False) -> None:
    """Show one run: its stages, the validation loss around each growth, and its files."""
    path = find_run(run)
    from stackwise.tracking.folder import RunFolder
    from stackwise.tracking.history import RunHistory
    from stackwise.tracking.metrics import read_metrics

    folder = RunFolder.open(path)
    history = RunHistory.from_events(read_metrics(folder.metrics).events)
    if as_json:
        print_json(_facts(folder, history))
        return
    _print_run(folder, history)


@app.command("compare")
def compare(runs: Runs, as_json: Json = False) -> None:
    """Put runs beside each other: their figures, and the settings in which they differ.

    `stackwise report RUN RUN...` makes a page of it, with curves. To train several configs for the same compute:
    `stackwise compare`.

    \b
    Examples:
      stackwise runs compare demo demo-end-to-end
      stackwise runs compare runs/a runs/b --json
    """
    paths = find_runs(runs)
    if len(paths) < 2:
        raise UsageError("give two runs or more; `stackwise runs show RUN` shows one")
    from stackwise.cli.groups import print_differences, print_groups
    from stackwise.tracking.groups import differences, labelled, warnings_about
    from stackwise.tracking.page import ReportedRun

    groups = labelled(ReportedRun.read(path) for path in paths)
    rows = differences(groups)
    if as_json:
        print_json(
            {
                "runs": [group.to_dict() for group in groups],
                "differences": {row.key: row.values for row in rows},
                "warnings": warnings_about(groups),
            }
        )
        return
    print_groups("", groups)
    print_differences(groups, rows)
    for warning in warnings_about(groups):
        note(warning)


@app.command("rm")
def rm(run: Run, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Delete a run: its checkpoints, metrics and report. Files of other kinds in its folder stay."""
    path = find_run(run)
    from stackwise.checkpoint.lock import WriterLock
    from stackwise.tracking import units
    from stackwise.tracking.folder import RunFolder

    folder = RunFolder.open(path)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"removing {path} needs a yes, and there is no terminal to ask; add --yes")
        if not typer.confirm(f"Delete the run in {path} ({units.size(folder.size_bytes())})?"):
            print("Nothing was deleted.")
            return
    if folder.store.is_dir():
        with WriterLock(folder.store / "LOCK") as lock:  # nobody may be training there
            lock.acquire()
            folder.remove()
    else:
        folder.remove()
    print(f"deleted {path}" if not path.exists() else f"deleted the run in {path}; other files in it stay")


def validation_table(history: RunHistory) -> list[list[str]]:
    """Rows of stage, stacks, weights, trained ones, steps and validation loss: before growth, after it, at the stage's end."""
    from stackwise.tracking import units

    growths = {growth.stage: growth for growth in history.growths}
    rows = []
    for stage in history.stages:
        growth = growths.get(stage.index)
        before = growth.before["loss"] if growth and growth.before else None
        rows.append(
            [
                f"{stage.index + 1} {stage.get('name')}",
                str(stage.get("n_stacks")),
                units.count(stage.get("params")),
                units.count(stage.get("trainable_params")),
                units.steps(stage.get("steps") or 0),
                units.loss(before),
                units.loss(growth.after["loss"] if growth else None),
                units.loss(stage.end["eval_loss"] if stage.end else None),
                units.duration(stage.end["seconds"] if stage.end else None),
            ]
        )
    return rows


VALIDATION_COLUMNS = [
    "stage",
    "stacks",
    "weights",
    "trained",
    "steps",
    "before growth",
    "after",
    "stage end",
    "time",
]


def _print_run(folder: RunFolder, history: RunHistory) -> None:
    from stackwise.tracking import units

    hint = HINTS[history.status]
    print(units.printable(f"{folder.path}: {history.status}") + (f" ({hint})" if hint else ""))
    facts = {
        "step": f"{units.steps(history.step)} of {units.steps(history.total_steps or 0)}",
        "tokens": units.count(history.latest("tokens")),
        "compute": units.flops(history.latest("flops")),
        "time": units.duration(history.latest("seconds")),
        "started": _date(history.first_time),
        "disk": units.size(folder.size_bytes()),
    }
    print("  " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(
        "",
        VALIDATION_COLUMNS,
        validation_table(history),
        caption=units.labelled("Validation losses in nats per token", history.eval_label) + ".",
    )
    name = shlex.quote(str(folder.path))
    if folder.report.exists():
        print(f"\nReport  {folder.report}")
    steps = {"text_from_it": f"stackwise generate {name}", "measure_it": f"stackwise eval {name}"}
    if history.status != "done":
        steps["continue_it"] = f"stackwise train {shlex.quote(str(folder.config))} --resume"
    next_steps(**steps)


def _facts(folder: RunFolder, history: RunHistory) -> dict[str, Any]:
    return {
        "path": str(folder.path),
        "run_id": history.run_id,
        "status": history.status,
        "step": history.step,
        "total_steps": history.total_steps,
        "loss": history.loss,
        "eval_loss": history.eval_loss,
        "eval_label": history.eval_label,
        "tokens": history.latest("tokens"),
        "flops": history.latest("flops"),
        "seconds": history.latest("seconds"),
        "size_bytes": folder.size_bytes(),
        "stages": [{"plan": stage.plan, "end": stage.end} for stage in history.stages],
        "growths": [
            {"stage": growth.stage, "before": growth.before, "after": growth.after}
            for growth in history.growths
        ],
    }


def _date(seconds: float | None) -> str:
    return "–" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
