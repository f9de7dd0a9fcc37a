"""From `tracking.sinks` to trackers: what each needs, and where it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from stackwise.config.errors import ConfigError, Problem, masked
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import MetricsFile, last_step, read_metrics
from stackwise.tracking.settings import TrackingSettings
from stackwise.tracking.sinks.base import Guarded, TrackerSink
from stackwise.tracking.sinks.csv_file import CsvFile
from stackwise.tracking.sinks.tensorboard import TensorBoard
from stackwise.tracking.sinks.trackio import Trackio
from stackwise.tracking.sinks.wandb import WandB

__all__ = ["LIBRARIES", "Trackers", "check_libraries"]

LIBRARIES = {
    "tensorboard": ("tensorboard", "track"),
    "trackio": ("trackio", "track"),
    "wandb": ("wandb", "wandb"),
}
"""Tracker -> the package it needs, and the extra that installs it."""


def check_libraries(names: Sequence[str]) -> None:
    """Raise ConfigError for every tracker whose package is missing."""
    problems = [
        Problem(
            "tracking.sinks",
            f"{name} needs the package {LIBRARIES[name][0]}",
            hint=f'pip install "stackwise[{LIBRARIES[name][1]}]", or leave {name} out',
        )
        for name in names
        if name in LIBRARIES and find_spec(LIBRARIES[name][0]) is None
    ]
    if problems:
        raise ConfigError(problems)


class Trackers:
    """All trackers of a run. Make them before metrics.jsonl is cut for a resume, and open them after that."""

    def __init__(
        self, settings: TrackingSettings, folder: RunFolder, run_id: str, say: Callable[[str], None]
    ) -> None:
        """`say` takes a sentence about a tracker that failed."""
        check_libraries(settings.sinks)
        self.sinks = [Guarded(_tracker(name, settings, folder, run_id), say) for name in settings.sinks]

    def open(self, metrics: MetricsFile, config: Mapping[str, Any], *, resumed: bool) -> None:
        """Hand over what happened so far. A tracker that cannot be opened ends a new run, and never a resumed one."""
        if self.sinks:
            events, shown = read_metrics(metrics.path).events, masked(dict(config))
            for sink in self.sinks:
                sink.open(events, shown, must=not resumed)

    def rewind(self, metrics: MetricsFile) -> None:
        """The run went back to an earlier commit, and metrics.jsonl with it."""
        events = read_metrics(metrics.path).events if self.sinks else []
        for sink in self.sinks:
            sink.rewind(events)

    def last_words(self) -> list[str]:
        return [words for sink in self.sinks if (words := sink.last_words()) is not None]


def _tracker(name: str, settings: TrackingSettings, folder: RunFolder, run_id: str) -> TrackerSink:
    if name == "csv":
        return CsvFile(folder.csv)
    if name == "tensorboard":
        return TensorBoard(folder.tensorboard)
    if name == "trackio":
        return Trackio(folder.trackio, settings.project, run_id)
    return WandB(folder.wandb, settings.project, run_id, last_step(folder.metrics))
