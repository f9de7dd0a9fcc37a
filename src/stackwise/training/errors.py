"""What can end a run early, each with the exit code the command line answers."""

from __future__ import annotations

import signal


class NumericError(ArithmeticError):
    """A loss or gradient that is not finite; nothing of that step was applied."""

    exit_code = 5


class IncompatibleResumeError(ValueError):
    """The stored run was made with other settings that decide its course."""

    exit_code = 7


class Interrupted(Exception):
    """A signal asked the run to stop; its state was saved first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 143 if signum == signal.SIGTERM else 128 + signum
