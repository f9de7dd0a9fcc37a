"""The events of a run, put in order: what the report, the plots and the list of runs read.

A run that was interrupted and resumed may announce a stage or an evaluation twice; the last announcement counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Growth", "RunHistory", "StageHistory", "validation_by_commit"]

Event = Mapping[str, Any]


@dataclass
class StageHistory:
    """One stage as it was planned, started and ended; a part that has not happened is None."""

    index: int
    plan: Event | None = None  # its entry in run_start
    start: Event | None = None  # stage_start
    end: Event | None = None  # stage_end
    steps: list[Event] = field(default_factory=list)  # step events

    def get(self, name: str) -> Any:
        """A field from the latest event that has it, else None."""
        for event in (self.end, self.start, self.plan):
            if event is not None and name in event:
                return event[name]
        return None

    @property
    def name(self) -> str:
        return self.get("name") or f"stage {self.index + 1}"

    @property
    def training_losses(self) -> tuple[float | None, float | None]:
        """The first and the last that was logged (means since the line before), or else of the first and last step."""
        if self.steps:
            return self.steps[0]["loss"], self.steps[-1]["loss"]
        return (self.end["loss_first"], self.end["loss_last"]) if self.end else (None, None)

    @property
    def reached(self) -> bool:
        return self.start is not None or self.end is not None or bool(self.steps)


@dataclass(frozen=True)
class Growth:
    """Validation of the same tokens just before and just after new weights joined; eval events, or None."""

    stage: int
    before: Event | None
    after: Event


@dataclass
class RunHistory:
    """The whole run. Lists are in the order of training."""

    start: Event | None = None  # the last run_start
    end: Event | None = None  # run_end, if nothing followed it
    stages: list[StageHistory] = field(default_factory=list)
    steps: list[Event] = field(default_factory=list)
    evals: list[Event] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    samples: list[Event] = field(default_factory=list)
    checkpoints: list[Event] = field(default_factory=list)
    notes: list[Event] = field(default_factory=list)
    last_words: list[Event] = field(default_factory=list)  # the notes that nothing but run_end followed
    starts: int = 0  # 1 + the number of times the run was resumed
    first_time: float | None = None  # unix seconds

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> RunHistory:
        run = cls()
        stages: dict[int, StageHistory] = {}
        evals: dict[tuple[Any, ...], Event] = {}
        samples: dict[tuple[Any, ...], Event] = {}
        for event in events:
            kind = event["event"]
            if run.first_time is None:
                run.first_time = event["time"]
            if kind == "run_start":
                run.start, run.starts = event, run.starts + 1
                for index, plan in enumerate(event["stages"]):
                    stages.setdefault(index, StageHistory(index)).plan = plan
            elif kind == "eval":
                key = (event["step"], event["stage"], event["when"])
                evals.pop(key, None)  # so that a repeated one moves to its new place
                evals[key] = event
            elif kind == "sample":
                samples[event["step"], event["prompt"]] = event
            elif kind == "checkpoint":
                run.checkpoints.append(event)
            elif kind == "note":
                run.notes.append(event)
            run.end = event if kind == "run_end" else None
            if kind == "note":
                run.last_words.append(event)
            elif kind != "run_end":
                run.last_words.clear()
            if "stage" in event:
                stage = stages.setdefault(event["stage"], StageHistory(event["stage"]))
                if kind == "stage_start":
                    stage.start = event
                elif kind == "stage_end":
                    stage.end = event
                elif kind == "step":
                    stage.steps.append(event)
                    run.steps.append(event)
        run.stages = [stages[index] for index in sorted(stages)]
        run.evals = list(evals.values())
        run.samples = list(samples.values())
        run.growths = _growths(run.evals)
        return run

    @property
    def status(self) -> str:
        """``done``, ``stopped``, ``failed``, or ``unfinished``: still training, or ended without a word."""
        return self.end["status"] if self.end else "unfinished"

    @property
    def run_id(self) -> str | None:
        return self.start["run_id"] if self.start else None

    @property
    def step(self) -> int:
        """The last step any event knows of."""
        known = [
            *self.steps[-1:],
            *self.evals[-1:],
            *self.checkpoints[-1:],
            *([self.end] if self.end else []),
        ]
        return max((event["step"] for event in known), default=0)

    @property
    def total_steps(self) -> int | None:
        return self.start["total_steps"] if self.start else None

    @property
    def stage(self) -> StageHistory | None:
        """The last stage that began."""
        return next((stage for stage in reversed(self.stages) if stage.reached), None)

    @property
    def loss(self) -> float | None:
        """The last training loss logged, nats per token."""
        return self.steps[-1]["loss"] if self.steps else None

    @property
    def eval_loss(self) -> float | None:
        """The last validation loss, nats per token."""
        return self.evals[-1]["loss"] if self.evals else None

    @property
    def eval_label(self) -> str | None:
        """What the last validation loss is: exact, bound, part of a bound or pseudo."""
        return self.evals[-1]["label"] if self.evals else None

    def latest(self, name: str) -> Any:
        """``tokens``, ``flops`` or ``seconds`` so far, from the last event that counts the whole run."""
        counted = [self.end, *self.steps[-1:], *self.evals[-1:]]
        return max((event[name] for event in counted if event is not None), default=None)

    @property
    def peak_rss_bytes(self) -> int | None:
        if self.end and self.end["peak_rss_bytes"] is not None:
            return self.end["peak_rss_bytes"]
        return max(
            (event["rss_bytes"] for event in self.steps if event["rss_bytes"] is not None), default=None
        )


def validation_by_commit(events: Iterable[Event]) -> dict[str, float]:
    """Loss of the evaluation at the step of each save, by commit. Of several saves at one step the last one counts,
    and of evaluations around a growth none: those measure another model."""
    saved: dict[int, str] = {}
    measured: dict[int, float] = {}
    for event in events:
        if event["event"] == "checkpoint":
            saved[event["step"]] = event["commit"]
        elif event["event"] == "eval" and event["when"] in ("interval", "stage_end", "final"):
            measured[event["step"]] = event["loss"]
    return {
        commit: measured[step]
        for step, commit in saved.items()
        if math.isfinite(measured.get(step, math.nan))
    }


def _growths(evals: list[Event]) -> list[Growth]:
    growths = []
    for i, after in enumerate(evals):
        if after["when"] != "after_growth":
            continue
        # The model before the growth is the one that ended the last stage, whichever evaluation measured it.
        same_model = [e for e in evals[:i] if e["step"] == after["step"] and e["when"] != "after_growth"]
        growths.append(Growth(after["stage"], same_model[-1] if same_model else None, after))
    return growths
