"""What can be wrong with a file before anything is made of it."""

from pathlib import Path
from typing import ClassVar


class DamagedFileError(ValueError):
    """Bytes that are not a whole file of their kind: cut short, grown, no JSON, no UTF-8."""

    exit_code: ClassVar[int] = 3


class UnsafeInputError(ValueError):
    """A file that is refused because reading on could do harm.

    It is a pickle or names code, lies outside of its folder, is no regular file, says one thing twice, or asks for
    more memory than a file of its kind can need. Nothing of it was used.
    """

    exit_code: ClassVar[int] = 8


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
