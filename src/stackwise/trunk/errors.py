"""What can go wrong with stored activations, with the exit code of each."""

from pathlib import Path
from typing import ClassVar


class CacheError(RuntimeError):
    """Stored activations that are damaged or cannot be written. The message names the file and the way out."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path
        """The file or folder it is about."""


class CacheInUseError(CacheError):
    """Another process is writing to the store."""

    exit_code: ClassVar[int] = 4
