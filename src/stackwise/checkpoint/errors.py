"""What can go wrong with a checkpoint store, with the exit code of each."""

from pathlib import Path
from typing import ClassVar


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or could not be written.

    The message names the part and the file, what is intact, and what to do next.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, path: Path | None = None, part: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        """The file it is about, where there is one."""
        self.part = part
        """The part of the checkpoint it is about, such as `stack:s0/weights`, where there is one."""


class LockError(CheckpointError):
    """Another process writes to this store, or the file system cannot lock."""

    exit_code: ClassVar[int] = 4


class SpaceError(CheckpointError):
    """No room for the files of a commit. What was in the store before is still there."""

    exit_code: ClassVar[int] = 6


class VersionError(CheckpointError):
    """The commit was written in a format that this version does not know."""

    exit_code: ClassVar[int] = 7


class CommitNameError(CheckpointError):
    """No commit, or more than one, has this name; or a pin cannot have it."""

    exit_code: ClassVar[int] = 2
