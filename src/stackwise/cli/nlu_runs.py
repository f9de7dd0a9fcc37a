"""The tasks of `stackwise nlu`, one after another: progress, what is kept, and what Ctrl-C leaves."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stackwise.cli.output import note
from stackwise.evaluation.nlu.recipes import Recipe, recipe_of
from stackwise.evaluation.nlu.run import Found, run_task
from stackwise.evaluation.nlu.tasks import Task
from stackwise.evaluation.record import keep, make_ready, record_of
from stackwise.tracking.units import duration
from stackwise.training.device import keep_freed_memory, pick_device, pick_dtype
from stackwise.training.stored import OpenRun, open_run


def run_all(
    path: Path,
    opened: OpenRun,
    tasks: Sequence[Task],
    *,
    method: str,
    seeds: int,
    changes: dict[str, Any],
    out: Path | None,
) -> tuple[list[Found], dict[str, Any], bool]:
    """What was found of each task, the same as JSON, and whether Ctrl-C came before the end."""
    keep_freed_memory()
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    recipes = [recipe_of(task, **changes) for task in tasks]
    clock = Clock([_work(task, recipe, seeds) for task, recipe in zip(tasks, recipes, strict=True)], seeds)
    found: list[Found] = []
    learned_in = str(dtype).removeprefix("torch.")
    facts = record_of(
        path,
        opened,
        {
            "method": method,
            "seeds": seeds,
            "device": device.type,
            "learned_in": learned_in,
            "scored_in": "float32",
        },
    )
    facts["parameters"] = opened.rack.get_parameter_count()
    facts["versions"] |= {name: version(name) for name in ("scikit-learn", "scipy")}
    facts["tasks"] = {}
    asked = [
        [task.name, task.split, sorted(task.hashes.items()), asdict(recipe)]
        for task, recipe in zip(tasks, recipes, strict=True)
    ]
    kept: Path | None = None
    if out is not None:
        make_ready(out)
    try:
        for task, recipe in zip(tasks, recipes, strict=True):
            clock.begin(task.name)
            result = run_task(
                task,
                lambda: open_run(path, commit=opened.commit.id),
                recipe,
                method=method,
                seeds=seeds,
                device=device,
                dtype=dtype,
                told=clock.step,
            )
            clock.end(f"{result.metric} {result.summary()[result.metric]['mean']:.4f}")
            found.append(result)
            facts["tasks"][task.name] = result.to_dict()
            if out is not None:
                kept = keep(out, facts, asked)
    except KeyboardInterrupt:
        clock.clear()
        note(f"stopped; {len(found)} of {len(tasks)} tasks are finished")
    if kept is not None:
        note(f"the figures are in {kept}")
    return found, facts, len(found) < len(tasks)


def _work(task: Task, recipe: Recipe, seeds: int) -> float:
    """About how long a task takes, in any unit: characters read while learning."""
    return float(seeds * recipe.epochs * sum(len(text) for texts in task.train.texts for text in texts))


class Clock:
    """Progress on standard error: a line that is written over on a terminal, else a line per seed."""

    def __init__(self, works: Sequence[float], seeds: int) -> None:
        self.works, self.seeds, self.at, self.name = works, seeds, -1, ""
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def begin(self, name: str) -> None:
        """The next task begins."""
        self.at, self.name = self.at + 1, name

    def step(self, seed: int, done: int, total: int) -> None:
        """A step of the task was made."""
        now = time.monotonic()
        if self.live and now - self.shown < 0.5 and done < total:
            return
        if not self.live and done < total:
            return
        self.shown = now
        share = (sum(self.works[: self.at]) + self.works[self.at] * (seed + done / total) / self.seeds) / sum(
            self.works
        )
        left = duration((now - self.began) * (1 - share) / share)
        text = (
            f"{self.name}  seed {seed + 1} of {self.seeds}  step {done} of {total}  {share:.0%}  {left} left"
        )
        print(
            f"\r\033[K{text}" if self.live else text,
            end="" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )

    def end(self, text: str) -> None:
        """A task is finished."""
        self.clear()
        print(f"{self.name}  {text}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take away the line that is written over."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
