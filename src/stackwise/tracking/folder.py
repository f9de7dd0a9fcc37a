"""The run folder: which file is what, and the list of runs in a directory."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from stackwise.storage import ops
from stackwise.tracking import metrics
from stackwise.tracking.environment import environment
from stackwise.tracking.history import RunHistory

__all__ = ["RunFolder", "RunFolderError", "RunSummary", "list_runs"]


class RunFolderError(OSError):
    """A run folder that is missing, taken, or not a run folder."""


class RunFolder:
    """The files of one run. Nothing else in the project spells their names.

    ======================  =====================================================
    ``config.yaml``         the resolved configuration
    ``environment.json``    versions, processor, memory, source commit
    ``metrics.jsonl``       every event of the run (``stackwise.tracking.events``)
    ``tokenizer.json``      the tokenizer
    ``store/``              checkpoints
    ``plots/``              pictures (PNG)
    ``report.html``         the report, one file
    ``sample.txt``          the last text sampled
    ``depth.json``          depth diagnostics (``stackwise eval RUN --depth``)
    ``failures/step-<n>/``  the facts of a step that went wrong
    ``metrics.csv``         steps and evaluations as a table (``tracking.sinks``)
    ``tensorboard/``        event files, written by TensorBoard
    ``trackio/``            a database, written by Trackio
    ``wandb/``              what Weights & Biases keeps of the run
    ======================  =====================================================
    """

    def __init__(self, path: str | Path) -> None:
        """Name the files below ``path``; nothing is read, checked or made (see ``create`` and ``open``)."""
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / metrics.FILE_NAME
        self.tokenizer = self.path / "tokenizer.json"
        self.store = self.path / "store"
        self.plots = self.path / "plots"
        self.report = self.path / "report.html"
        self.sample = self.path / "sample.txt"
        self.depth = self.path / "depth.json"
        self.failures = self.path / "failures"
        self.csv = self.path / "metrics.csv"
        self.tensorboard = self.path / "tensorboard"
        self.trackio = self.path / "trackio"
        self.wandb = self.path / "wandb"

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> Self:
        """A folder for a new run, made if need be.

        A folder that already holds a run raises ``RunFolderError`` unless ``overwrite``; then the files of the old
        run go, and only those. The caller makes sure that no other process is training there.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise RunFolderError(f"{run.path} is a file; choose another training.run_id or checkpoint.dir")
        if run.holds_a_run():
            if not overwrite:
                raise RunFolderError(
                    f"{run.path} already holds a run. Continue it with checkpoint.resume=auto, replace it with "
                    "checkpoint.overwrite=true, or choose another training.run_id"
                )
            run.remove()
        ops.make_dir(run.path)
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The folder of an existing run; ``RunFolderError`` when there is none."""
        run = cls(path)
        if not run.path.is_dir():
            raise RunFolderError(f"{run.path} is not a folder; `stackwise runs` lists the runs there are")
        if not run.holds_a_run():
            raise RunFolderError(
                f"{run.path} holds no run (no {run.config.name}, {run.metrics.name} or {run.store.name}/); "
                "`stackwise runs` lists the runs there are"
            )
        return run

    def holds_a_run(self) -> bool:
        return any(path.exists() for path in (self.config, self.metrics, self.store))

    def write_config(self, yaml_text: str) -> None:
        ops.replace_text(self.config, yaml_text)

    def write_environment(self) -> dict[str, Any]:
        """Record ``environment()`` and return it."""
        facts = environment()
        ops.replace_text(self.environment, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return facts

    def write_sample(self, text: str) -> None:
        ops.replace_text(self.sample, text if text.endswith("\n") else text + "\n")

    def write_failure(self, facts: dict[str, Any], *, config: str) -> str:
        """Keep what is known of the step that ``facts`` describe, beside the configuration; returns the folder."""
        folder = self.failures / f"step-{facts['step']:09d}"
        if folder.exists():  # the same step, in an earlier attempt
            ops.remove_tree(folder)
        text = json.dumps({**facts, "environment": environment()}, indent=2, ensure_ascii=False) + "\n"
        with ops.appearing(folder) as part:
            ops.replace_text(part / "facts.json", text)
            ops.replace_text(part / "config.yaml", config)
        return str(folder)

    def size_bytes(self) -> int:
        """Bytes of all files below the folder; a file that vanishes meanwhile counts nothing."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue
        return total

    def remove(self) -> None:
        """Delete the files of the run, and only those; then the folder, if nothing else is in it.

        The caller makes sure that no other process is training there.
        """
        for old in self._all():
            ops.remove_tree(old)
        with contextlib.suppress(OSError):  # it holds something else
            ops.rmdir(self.path)

    def _all(self) -> list[Path]:
        return [
            path
            for path in (
                self.config,
                self.environment,
                self.metrics,
                *self.path.glob("metrics.damaged-*.jsonl"),
                self.tokenizer,
                self.store,
                self.plots,
                self.report,
                self.sample,
                self.depth,
                self.failures,
                self.csv,
                self.tensorboard,
                self.trackio,
                self.wandb,
            )
            if path.exists() or path.is_symlink()
        ]


@dataclass(frozen=True)
class RunSummary:
    """One line of ``stackwise runs``. Losses in nats per token; None = not known (yet)."""

    path: Path
    run_id: str
    status: str
    """done, stopped, failed, unfinished (still training, or ended without a word) or damaged"""
    step: int
    total_steps: int | None
    n_stacks: int | None
    n_params: int | None
    loss: float | None
    eval_loss: float | None
    tokens: int | None
    seconds: float | None
    started: float | None
    """unix seconds"""
    size_bytes: int
    damage: str | None = None
    """What is wrong with a damaged run; the other fields hold what could still be read."""


def list_runs(directory: str | Path) -> list[RunSummary]:
    """The runs directly below ``directory``, oldest first. Folders that hold no run are passed over.

    A run whose files cannot be read is listed as ``damaged`` with the reason; it never hides the others.
    A missing directory raises ``FileNotFoundError``, a file ``NotADirectoryError``.
    """
    runs = []
    for path in sorted(Path(directory).iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            if RunFolder(path).holds_a_run():
                runs.append(_summary(RunFolder(path)))
        except OSError as error:
            runs.append(_unreadable(path, error))
    return sorted(runs, key=lambda run: (run.started or 0.0, run.run_id))


def _summary(run: RunFolder) -> RunSummary:
    damage = []
    history = RunHistory()
    if run.metrics.exists():
        log = metrics.read_metrics(run.metrics, strict=False)
        damage += log.listed_problems
        history = RunHistory.from_events(log.events)
        if log.events and history.start is None:
            damage.append(f"{run.metrics.name}: no run_start event")
    elif run.store.exists():
        damage.append(f"{run.metrics.name} is missing")
    if not run.config.exists():
        damage.append(f"{run.config.name} is missing")
    stage = history.stage
    return RunSummary(
        path=run.path,
        run_id=history.run_id or run.path.name,
        status="damaged" if damage else history.status,
        step=history.step,
        total_steps=history.total_steps,
        n_stacks=stage.get("n_stacks") if stage else None,
        n_params=history.start["n_params"] if history.start else None,
        loss=history.loss,
        eval_loss=history.eval_loss,
        tokens=history.latest("tokens"),
        seconds=history.latest("seconds"),
        started=history.first_time,
        size_bytes=run.size_bytes(),
        damage="; ".join(damage) or None,
    )


def _unreadable(path: Path, error: OSError) -> RunSummary:
    reason = f"{error.filename or path}: {error.strerror or error}"
    unknown = dict.fromkeys(
        ("total_steps", "n_stacks", "n_params", "loss", "eval_loss", "tokens", "seconds", "started")
    )
    return RunSummary(path, path.name, "damaged", step=0, size_bytes=0, damage=reason, **unknown)
