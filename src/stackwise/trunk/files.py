"""Files of the activation store: how they are opened, and who may write to a folder.

Entries are only named in an index once their bytes are on the disk. What changes the disk is in `storage.ops`. Needs a
POSIX system (flock).
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from stackwise.storage import ops


def open_file(path: Path, *, create: bool = False) -> int:
    """Descriptor of a regular file, links refused; with `create` for writing too."""
    if create:
        return ops.open_to_change(path, 0o600)
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def cut(path: Path, size: int) -> None:
    """Drop what a file holds after `size` bytes."""
    fd = open_file(path, create=True)
    try:
        ops.truncate(fd, size)
    finally:
        os.close(fd)


class FolderLock:
    """The exclusive right to write to a folder: a kernel lock on the file LOCK in it, gone with its holder."""

    _held: weakref.WeakSet[FolderLock] = weakref.WeakSet()

    def __init__(self, folder: Path) -> None:
        self.path = folder / "LOCK"
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self) -> bool:
        """Take the lock without waiting; False when somebody else has it."""
        while self._fd is None:
            fd = open_file(self.path, create=True)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            except OSError:
                os.close(fd)
                raise
            # Its holder may have removed the folder between the opening and the locking.
            if self.path.exists() and os.fstat(fd).st_ino == self.path.stat().st_ino:
                self._fd = fd
                FolderLock._held.add(self)
            else:
                os.close(fd)
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        fd, self._fd = self._fd, None
        FolderLock._held.discard(self)
        if fd is not None:
            os.close(fd)

    @classmethod
    def forget_all(cls) -> None:
        """In a forked child, whose copies would keep the locks of a parent that was killed."""
        for lock in list(cls._held):
            lock.release()


os.register_at_fork(after_in_child=FolderLock.forget_all)
