"""What can go wrong with a checkpoint store, with the exit code of each."""

from typing import ClassVar

from stackwise.storage.errors import CheckpointError

__all__ = ["CheckpointError", "CommitNameError", "LockError", "SpaceError", "VersionError"]


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
