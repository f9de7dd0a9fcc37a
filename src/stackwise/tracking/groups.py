"""Runs beside each other: what each has come to, over its seeds, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from stackwise.config.document import flattened, parse
from stackwise.config.errors import ConfigError, masked
from stackwise.config.root import StackWiseConfig
from stackwise.tracking.history import RunHistory
from stackwise.tracking.page import ReportedRun

__all__ = ["FIGURES", "Difference", "RunGroup", "Spread", "differences", "warnings_about"]

_PLACES = {
    "training.run_id",
    "checkpoint.dir",
    "checkpoint.resume",
    "checkpoint.overwrite",
    "data.cache_dir",
    "training.progressive.cache_dir",
}
"""Keys that say where a run is kept, and nothing of the run."""


@dataclass(frozen=True)
class Spread:
    """A figure over `count` runs."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(sum(values) / len(values), min(values), max(values), len(values)) if values else None

    def text(self, show: Callable[[float], str]) -> str:
        """The mean, and the range where there is one."""
        mean, low, high = show(self.mean), show(self.low), show(self.high)
        return mean if low == high else f"{mean} ({low} to {high})"


FIGURES: dict[str, Callable[[RunHistory], float | None]] = {
    "params": lambda run: run.start["n_params"] if run.start else None,
    "steps": lambda run: run.step,
    "tokens": lambda run: run.latest("tokens"),
    "flops": lambda run: run.latest("flops"),
    "loss": lambda run: run.eval_loss,
    "bits_per_byte": lambda run: run.evals[-1]["bits_per_byte"] if run.evals else None,
    "training_loss": lambda run: run.loss,
    "seconds": lambda run: run.latest("seconds"),
    "peak_bytes": lambda run: max((s.end["bytes"]["peak"] for s in run.stages if s.end), default=None),
    "peak_rss_bytes": lambda run: run.peak_rss_bytes,
}
"""What is compared of a run. `loss` is the last held-out one, in nats per token; `peak_bytes` are counted bytes of the
stage that takes the most, `peak_rss_bytes` those of the whole process."""


@dataclass(frozen=True)
class RunGroup:
    """Runs under one label: the same settings with several seeds, or a single run."""

    label: str
    runs: list[ReportedRun]

    @cached_property
    def counted(self) -> list[RunHistory]:
        """The runs that figures are taken from: those that are done, or all where none is."""
        histories = [run.history for run in self.runs]
        return [run for run in histories if run.status == "done"] or histories

    @cached_property
    def figures(self) -> dict[str, Spread | None]:
        """By the names of `FIGURES`; null where no run knows it."""
        return {
            name: Spread.of([value for run in self.counted if (value := read(run)) is not None])
            for name, read in FIGURES.items()
        }

    @property
    def label_of_loss(self) -> str | None:
        """What the validation losses are: exact, bound, part of a bound or pseudo; the same for all runs of a group."""
        return next((run.eval_label for run in self.counted if run.eval_label), None)

    @property
    def status(self) -> str:
        """done, or how many of the runs are and what became of the others."""
        states = [run.history.status for run in self.runs]
        if len(set(states)) == 1:
            return states[0]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "label": self.label,
            "status": self.status,
            **{name: asdict(found) if found else None for name, found in self.figures.items()},
            "runs": [
                {
                    "path": str(run.folder.path),
                    "status": run.history.status,
                    **{name: read(run.history) for name, read in FIGURES.items()},
                }
                for run in self.runs
            ],
        }


@dataclass(frozen=True)
class Difference:
    """A key and its value in every group, in their order."""

    key: str
    values: list[Any]


def differences(groups: Sequence[RunGroup]) -> list[Difference]:
    """The keys of the stored settings in which the groups differ, by the first run of each.

    Keys that only say where a run is kept are left out, secrets hidden. A run of an earlier version that did not know a
    key had its default.
    """
    defaults = flattened(masked(StackWiseConfig().to_dict()))
    found = [_settings(group.runs[0]) for group in groups]
    keys = sorted(set().union(*found) - _PLACES) if all(found) else []
    rows = [Difference(key, [one.get(key, defaults.get(key)) for one in found]) for key in keys]
    return [row for row in rows if any(value != row.values[0] for value in row.values)]


def warnings_about(groups: Sequence[RunGroup]) -> list[str]:
    """Why the losses of the groups may not be put beside each other."""
    listed = [f"{group.label} is {group.status}" for group in groups if group.status != "done"]
    found = [f"Not every run is done: {', '.join(listed)}."] if listed else []
    unknown = [group.label for group in groups if not _settings(group.runs[0])]
    if unknown:
        found.append(
            f"The configuration of {', '.join(unknown)} cannot be read, so settings are not compared."
        )
    apart = {difference.key for difference in differences(groups)}
    if len({_tokenizer(group.runs[0]) for group in groups} - {b""}) > 1:
        found.append(
            "The runs have different tokenizers: losses in nats per token do not compare, bits per byte do."
        )
    other = sorted(key for key in apart if key.startswith("data.") and key != "data.tokenizer")
    if other:
        found.append(
            f"The runs do not have the same data ({', '.join(other)}), so their losses may not compare."
        )
    kinds = list(dict.fromkeys(group.label_of_loss for group in groups if group.label_of_loss))
    if len(kinds) > 1:
        found.append(f"The validation losses are not the same measure: {', '.join(kinds)}.")
    return found


def _settings(run: ReportedRun) -> dict[str, Any]:
    """The stored settings by dotted keys; {} where they cannot be read."""
    try:
        path = run.folder.config
        return flattened(masked(parse(path.read_text("utf-8"), path.name).data))
    except (OSError, ValueError, ConfigError):
        return {}


def _tokenizer(run: ReportedRun) -> bytes:
    """The file; nothing where there is none to read."""
    try:
        return run.folder.tokenizer.read_bytes()
    except OSError:
        return b""


def labelled(runs: Iterable[ReportedRun]) -> list[RunGroup]:
    """One group per run, by the names of their folders; where two share a name, by their paths."""
    listed = list(runs)
    names = [run.folder.path.resolve().name for run in listed]
    return [
        RunGroup(name if names.count(name) == 1 else str(run.folder.path), [run])
        for name, run in zip(names, listed, strict=True)
    ]
