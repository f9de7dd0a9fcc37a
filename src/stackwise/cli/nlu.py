"""`stackwise nlu`: fine-tuning a run on tasks of language understanding."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Run, Threads, find_run
from stackwise.cli.output import note, print_json, print_table
from stackwise.config.errors import did_you_mean

if TYPE_CHECKING:
    from stackwise.evaluation.nlu.run import Found
    from stackwise.evaluation.nlu.tasks import Task

SEEDS = 3


def nlu(
    run: Run,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAME,...", help="Folders of tasks, or names of GLUE's tasks.")
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FOLDER", help="Where the folders of the tasks are, by their names."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="full|lora|probe",
            help="Tune the whole rack, adapters on its stacks, or a linear model on its frozen vectors.",
        ),
    ] = "full",
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="dev|test|holdout",
            help="Rows that are scored; holdout: the last tenth of the training rows, for choosing settings.",
        ),
    ] = "dev",
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", metavar="N", min=1, help="Tune so many times anew; 3 by default, no probe."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", metavar="N", min=1, help="Passes over the training rows.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", metavar="RATE", help="Peak learning rate of the rack or its adapters."),
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(
            "--pair",
            metavar="twin|joint",
            help="Read the texts of a pair one by one and compare, or both in one row.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Keep the figures in a JSON file in this folder."),
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Fine-tune a run on tasks, with several seeds, and score it beside two methods that know no run.

    A task is a folder with train.jsonl and dev.jsonl: one text with a label, a pair of texts, a text or pair with a
    score, or tokens with tags; docs/nlu.md shows the rows. Without --data a name that is no folder is a task of GLUE,
    fetched from the Hugging Face hub (`pip install 'stackwise[hf]'`). Figures are those of scikit-learn:
    `pip install 'stackwise[nlu]'`.

    The run itself is not changed. Ctrl-C keeps the tasks that are finished.

    \b
    Examples:
      stackwise nlu runs/encoder --tasks sst2,mrpc,stsb --data FOLDER
      stackwise nlu encoder --tasks my-task --method lora --seeds 5 --out results
      stackwise nlu encoder --tasks cola --data FOLDER --split holdout --epochs 8 --json
    """
    path = find_run(run)
    _check(method, split, pair, {"--lr": lr, "--epochs": epochs, "--seeds": seeds})
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("`stackwise nlu` needs scikit-learn: pip install 'stackwise[nlu]'")
    from stackwise.training.stored import open_run

    opened = open_run(path)
    listed = [_task(word, data, split) for word in _words(tasks)]
    from stackwise.cli.nlu_runs import run_all

    changes: dict[str, Any] = {"epochs": epochs, "pair": pair, "lora_lr" if method == "lora" else "lr": lr}
    found, facts, stopped = run_all(
        path,
        opened,
        listed,
        method=method,
        seeds=1 if method == "probe" else seeds or SEEDS,
        changes=changes,
        out=out,
    )
    if as_json:
        print_json(facts)
    elif found:
        _print(path, found)
    if stopped:
        raise KeyboardInterrupt


def _check(method: str, split: str, pair: str | None, learning: dict[str, Any]) -> None:
    """UsageError for an option with a value that there is not. `learning`: options that say how it is tuned."""
    from stackwise.evaluation.nlu.recipes import METHODS, PAIR_FORMS
    from stackwise.evaluation.nlu.tasks import SPLITS

    for name, value, allowed in (
        ("--method", method, METHODS),
        ("--split", split, SPLITS),
        ("--pair", pair or PAIR_FORMS[0], PAIR_FORMS),
    ):
        if value not in allowed:
            near = did_you_mean(value, allowed)
            raise UsageError(
                f"{name} must be {', '.join(allowed)}, got {value!r}" + (f"; {near}" if near else "")
            )
    lr = learning["--lr"]
    if lr is not None and not 0 < lr < float("inf"):
        raise UsageError(f"--lr must be a number above 0, got {lr}")
    given = [name for name, value in learning.items() if value is not None]
    if given and method == "probe":
        raise UsageError(
            f"{', '.join(given)} has no meaning for --method probe, which learns in one go and draws nothing; leave it out"
        )


def _words(tasks: str) -> list[str]:
    words = [word.strip() for word in tasks.split(",") if word.strip()]
    if not words:
        raise UsageError("--tasks names no task; give folders, or names of tasks, with commas between")
    names = [Path(word).name for word in words]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two tasks are called {name}; name each once")
    return words


def _task(word: str, data: Path | None, split: str) -> Task:
    from stackwise.evaluation.nlu.hub import hub_task
    from stackwise.evaluation.nlu.recipes import KNOWN
    from stackwise.evaluation.nlu.tasks import read_task, task_folder

    if data is None and word in KNOWN and not Path(word).exists():
        return hub_task(word, split)
    return read_task(task_folder(word, data), split)


def _print(path: Path, found: list[Found]) -> None:
    rows = []
    for result in found:
        for name, figure in result.summary().items():
            several = len(result.seeds) > 1
            rows.append(
                (
                    result.task.name,
                    name + (" *" if name == result.metric else ""),
                    f"{figure['mean']:.4f}",
                    f"{figure['lowest']:.4f} to {figure['highest']:.4f}" if several else "–",
                    f"{result.bag_of_words[name]:.4f}",
                    f"{result.majority[name]:.4f}",
                )
            )
    first = found[0]
    seeds = f"{len(first.seeds)} seeds" if len(first.seeds) > 1 else "one seed"
    print_table(
        f"{path}, {first.method}, {seeds}, scored on {first.task.split}",
        ["task", "text:figure", "mean", "range", "bag of words", "majority"],
        rows,
        caption="* what the task is judged by",
    )
    for result in found:
        if result.cut:
            note(
                f"{result.task.name}: {result.cut} texts lost their end, to fit into {result.recipe.max_tokens} tokens"
            )
