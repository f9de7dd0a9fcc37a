"""The numerics guard: what becomes of a step whose loss or gradient is not finite, or whose loss spikes.

It judges a step before anything is applied, from the loss, the gradient's norm and what it remembers of earlier steps
(`GuardState`, part of `Progress` and of every commit), so a resumed run decides as an uninterrupted one. A value that
is not finite, or a spike, never enters what it remembers of the losses.

A spike is a loss above mean + sigma standard deviations of the last `window` losses of the stage, judged once half of
the window is filled (OLMo, arXiv 2501.00656: 6 sigma over 128 losses). Rolling back as PaLM did: start again from a
commit some 100 steps earlier and skip the data in between (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from stackwise.config.errors import ConfigError, Problem
from stackwise.training.settings import TrainingSettings

RECENT = 1000
"""Steps over which failures are counted."""
MANY = 10
"""More steps than these that are not finite, among the recent ones, are no accident: 1 %, or 11 in a row."""
ROLLBACKS = 3
"""Among the recent steps; the next failure stops the run."""
LEVEL = 10
"""So many spikes in a row are a new level of the loss: what is remembered of the old one goes."""

Action = Literal["apply", "skip", "rollback", "stop"]


@dataclass
class GuardState:
    """What the guard remembers, JSON-able."""

    window: list[float] = field(default_factory=list)
    """The last losses of the stage that were neither spikes nor left out."""
    spikes_in_a_row: int = 0
    failed: list[int] = field(default_factory=list)
    """The recent steps whose loss or gradient was not finite."""
    rollbacks: list[int] = field(default_factory=list)
    """The recent steps at which the run went back."""
    abandoned: list[list[int]] = field(default_factory=list)
    """Numbers of the first and last commit of each stretch that was left by going back."""
    leap: list[int] = field(default_factory=list)
    """A stage and the batches to leave out at its start, where the run went back to before it; empty: none."""

    def went_back(self, step: int, later: GuardState, abandoned: list[int]) -> None:
        """Note, in the state of the commit gone back to, that the run came from `step`, where it was `later`.

        abandoned: numbers of the first and last commit made since; empty: none.
        """
        self.rollbacks = [*_recent(later.rollbacks, step), step]
        self.abandoned = [*later.abandoned, *([abandoned] if abandoned else [])]
        self.failed = []

    def start_stage(self) -> None:
        """Losses before a growth say nothing about those after it."""
        self.window, self.spikes_in_a_row = [], 0


@dataclass(frozen=True)
class Verdict:
    """What to do with a step; `why` says what was seen, empty where nothing was."""

    action: Action
    why: str = ""
    spike: bool = False
    hardware: bool = False


class Guard:
    """Judges the steps of a run by its settings and its state."""

    def __init__(self, settings: TrainingSettings, state: GuardState) -> None:
        self.settings, self.state = settings, state
        # Tensors that step in the backward pass cannot take it back: the first failure is one too many.
        self.tolerated = 0 if settings.optimizer.memory == "fused" else MANY

    def refuse_going_back(self) -> None:
        """ConfigError where the settings ask for it: the run has no commits."""
        for key in ("on_nonfinite", "spike_policy"):
            if getattr(self.settings, key) == "rollback":
                message = "goes back to a commit, and a run on a data loader of your own makes none"
                hint = "choose skip, or train with stackwise.train"
                raise ConfigError(Problem(f"training.{key}", message, "rollback", hint=hint))

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """`step`: the one that has been computed, 1-based over the run. To be called once for each."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._not_finite(step, f"loss {loss}, gradient norm {norm}")
        policy = self.settings.spike_policy
        limit = math.inf if policy == "off" else self.limit()
        if loss <= limit:
            self._remember(loss)
            return Verdict("apply")
        why = f"loss {loss:.4f} spikes above {limit:.4f} ({self._rule()})"
        self.state.spikes_in_a_row += 1
        if self.state.spikes_in_a_row > LEVEL:
            self.state.start_stage()
            self._remember(loss)
            return Verdict("apply", f"{why}, the {LEVEL + 1}th in a row: taken for a new level", spike=True)
        if policy == "rollback":
            return self._go_back(step, why, spike=True)
        return Verdict("skip" if policy == "skip" else "apply", why, spike=True)

    def limit(self) -> float:
        """The largest loss that is no spike; infinite until half of the window is filled."""
        held = self.state.window
        if len(held) < max(2, self.settings.spike_window // 2):
            return math.inf
        mean = math.fsum(held) / len(held)
        variance = math.fsum((loss - mean) ** 2 for loss in held) / (len(held) - 1)
        return mean + self.settings.spike_sigma * math.sqrt(variance)

    def _rule(self) -> str:
        return f"{self.settings.spike_sigma:g} sigma of the last {len(self.state.window)} losses"

    def _remember(self, loss: float) -> None:
        self.state.spikes_in_a_row = 0
        self.state.window = [*self.state.window, loss][-self.settings.spike_window :]

    def refuse(self, step: int, why: str) -> Verdict:
        """What to do about a state that must not be saved."""
        if self.settings.on_nonfinite == "rollback":
            return self._go_back(step, why)
        return Verdict("stop", why)

    def _not_finite(self, step: int, why: str) -> Verdict:
        policy = self.settings.on_nonfinite
        if policy == "stop":
            return Verdict("stop", why)
        self.state.failed = [*_recent(self.state.failed, step), step]
        if len(self.state.failed) <= self.tolerated:
            return Verdict("skip", why)
        if self.tolerated:
            why += f", {len(self.state.failed)} of the last {RECENT:,} steps were not finite"
        return self._go_back(step, why) if policy == "rollback" else Verdict("stop", why)

    def _go_back(self, step: int, why: str, spike: bool = False) -> Verdict:
        done = len(_recent(self.state.rollbacks, step))
        if done >= ROLLBACKS:
            return Verdict("stop", f"{why}, and going back {done} times has not helped", spike)
        return Verdict("rollback", why, spike)


def _recent(steps: list[int], now: int) -> list[int]:
    return [step for step in steps if now - RECENT < step]
