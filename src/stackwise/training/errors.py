"""What can end a run early, each with the exit code the command line answers."""

from __future__ import annotations

from typing import Any


class NumericError(ArithmeticError):
    """Numbers that are not finite, or wrong; nothing of that step is in any commit."""

    exit_code = 5


class GoBack(Exception):
    """The numerics guard wants the run to go on from an earlier commit; `training.run` answers it."""

    def __init__(self, message: str, *, steps: int, facts: dict[str, Any]) -> None:
        """`steps`: how far back at least. `facts`: what is known of the step; see `Stepping._facts`."""
        super().__init__(message)
        self.steps, self.facts = steps, facts


class OutOfMemory(MemoryError):
    """A run that needs more memory than there is; the message names where, how much, and what would need less."""


class IncompatibleResumeError(ValueError):
    """The stored run was made with other settings that decide its course."""

    exit_code = 7


class Interrupted(Exception):
    """A signal asked the run to stop; its state was saved first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum  # 130 SIGINT, 143 SIGTERM, 129 SIGHUP
