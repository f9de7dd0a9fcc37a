"""File operations of the activation store.

Entries are only named in an index once their bytes are on the disk, so the order of these calls is what a crash
depends on; they are here, where a test can record them or make them fail. Needs a POSIX system (flock).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import weakref
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(fd: int, data: memoryview, offset: int) -> int:
    """Bytes of `data` that were written at `offset`: maybe fewer than all."""
    return os.pwrite(fd, data, offset)


def sync(fd: int) -> None:
    """Return once the file's bytes, or the directory's entries, are on the disk."""
    os.fsync(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte. On an error the file is cut back to `offset`."""
    whole, done = memoryview(data).cast("B"), 0
    try:
        while done < len(whole):
            done += write(fd, whole[done:], offset + done)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, offset)
        raise


def open_file(path: Path, *, create: bool = False) -> int:
    """Descriptor of a regular file, links refused; with `create` for writing too."""
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def replace_text(path: Path, text: str) -> None:
    """Make the file hold `text`; a crash leaves what was there before or all of it."""
    part = path.with_name(f"{path.name}.new")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        write_all(fd, text.encode(), 0)
        sync(fd)
    finally:
        os.close(fd)
    part.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
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
