"""One writer at a time: a kernel lock (flock) on a file, gone as soon as the process that holds it is."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path

from stackwise.storage import ops

_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class NoLocksError(OSError):
    """The file system has no file locks."""


class FileLock:
    """The exclusive right that goes with the file `path`, which is made if it is missing. Two locks of one process exclude each other too."""

    _held: weakref.WeakSet[FileLock] = weakref.WeakSet()

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        self.path, self.mode = path, mode
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self) -> bool:
        """Take the lock without waiting; False when somebody else has it. OSError where the file cannot be opened."""
        while self._fd is None:
            fd = ops.open_to_change(self.path, self.mode)
            try:
                if not _locked(fd):
                    return False
                # Its holder may have removed the folder between the opening and the locking.
                if _lies_at(self.path, fd):
                    self._fd, fd = fd, -1
                    FileLock._held.add(self)
            finally:
                if fd >= 0:
                    os.close(fd)
        return True

    def write(self, text: str) -> None:
        """Say in the file who holds the lock."""
        assert self._fd is not None, "only the holder writes"
        ops.truncate(self._fd, 0)
        ops.pwrite_all(self._fd, text.encode(), 0)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        fd, self._fd = self._fd, None
        FileLock._held.discard(self)
        if fd is not None:
            os.close(fd)

    @classmethod
    def forget_all(cls) -> None:
        """In a forked child, whose copies would keep the locks of a parent that was killed. Closing them unlocks nothing."""
        for lock in list(cls._held):
            lock.release()


def _lies_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError(error.errno, error.strerror) from error
        raise
    return True


os.register_at_fork(after_in_child=FileLock.forget_all)
