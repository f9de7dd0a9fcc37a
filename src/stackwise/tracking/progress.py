"""How far a run is: smoothed figures and the time left, from the events alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Progress"]

_SMOOTHING = 0.3  # weight of the newest tokens/s
_WINDOW = 32  # step events that the time per step is taken over
_LOSSES = 600


class Progress:
    """State of a run for a display. Feed it every event with ``update``.

    ``seconds`` values are wall-clock seconds since this process began to train (a resumed run starts again at 0).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        # (step, seconds of training so far) within the stage: evaluations and saves do not count into the pace
        self._marks: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._trained: float | None = 0.0  # null after a resume, until a step tells
        self._seen = self._began
        self.stages: list[Mapping[str, Any]] = []
        self.stage = 0
        self.step = 0
        self.total_steps = 0
        self.stage_step = 0
        self.stage_event: Mapping[str, Any] | None = None
        self.losses: deque[float] = deque(maxlen=_LOSSES)
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.lr: float | None = None
        self.tokens_per_s: float | None = None
        self.rss_bytes: int | None = None
        self.saved_step: int | None = None

    def update(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "run_start":
            self._began = self._clock()
            self.stages = event["stages"]
            self.step, self.total_steps = event["start_step"], event["total_steps"]
            self._trained = None if self.step else 0.0
        elif kind == "stage_start":
            self.stage, self.stage_event = event["stage"], event
            self.stage_step = max(0, self.step - self._first_step(self.stage))
            self._marks.clear()
            if self._trained is not None:
                self._marks.append((self.step, self._trained))
        elif kind == "step":
            self.step, self.stage, self.stage_step = event["step"], event["stage"], event["stage_step"]
            self.loss, self.lr, self.rss_bytes = event["loss"], event["lr"], event["rss_bytes"]
            self.losses.append(event["loss"])
            old, new = self.tokens_per_s, event["tokens_per_s"]
            self.tokens_per_s = new if old is None else old + _SMOOTHING * (new - old)
            self._trained = event["seconds"]
            self._marks.append((self.step, event["seconds"]))
            self._seen = self._clock()
        elif kind == "eval":
            self.eval_loss = event["loss"]
        elif kind == "checkpoint":
            self.saved_step = event["step"]

    @property
    def stage_steps(self) -> int:
        return self.stages[self.stage]["steps"] if self.stage < len(self.stages) else 0

    @property
    def elapsed(self) -> float:
        return self._clock() - self._began

    @property
    def stage_seconds_left(self) -> float | None:
        """None until a step of this stage has been timed."""
        return self._left(self.stage_steps - self.stage_step)

    @property
    def seconds_left(self) -> float | None:
        """Time left for the run: this stage at its measured pace, the later ones scaled by their cost per step.

        A parameter costs two operations forwards and four more when it trains; that ratio, not the absolute count,
        is all that is used.
        """
        steps = float(self.stage_steps - self.stage_step)
        if self.stage < len(self.stages):
            here = _cost(self.stages[self.stage])
            steps += sum(stage["steps"] * _cost(stage) / here for stage in self.stages[self.stage + 1 :])
        return self._left(steps)

    def _left(self, steps: float) -> float | None:
        if len(self._marks) < 2 or self._marks[-1][0] == self._marks[0][0]:
            return None
        # The first step of a stage counts bytes and warms up: it says little about those to come.
        (first_step, first), (last_step, last) = (
            self._marks[1 if len(self._marks) > 2 else 0],
            self._marks[-1],
        )
        pace = (last - first) / (last_step - first_step)
        return max(0.0, steps * pace - (self._clock() - self._seen))

    def _first_step(self, stage: int) -> int:
        return sum(plan["steps"] for plan in self.stages[:stage])


def _cost(stage: Mapping[str, Any]) -> float:
    return 2.0 * stage["params"] + 4.0 * stage["trainable_params"] or 1.0
