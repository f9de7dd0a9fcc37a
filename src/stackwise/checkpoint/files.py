"""The file operations of the checkpoint store, with errors that say what is intact and what to do.

What changes the disk is in `storage.ops`.

Needs a POSIX system: flock, and fsync of directories.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from stackwise.checkpoint.errors import CheckpointError, LockError, SpaceError
from stackwise.storage import ops
from stackwise.storage.lock import FileLock, NoLocksError
from stackwise.storage.ops import NO_SPACE, Chunk

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_atomic(path: Path, chunks: Sequence[Chunk], *, tmp_dir: Path, kind: str) -> None:
    """Make `path` hold `chunks`, read-only; see `ops.write_atomic`. Raises SpaceError or CheckpointError."""
    with _explained("write", path, need=sum(len(chunk) for chunk in chunks)):
        # Read-only from the start: stored files never change, they are only replaced or removed.
        ops.write_atomic(path, chunks, kind=kind, tmp_dir=tmp_dir, mode=0o444)


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    with _explained("sync", path):
        ops.sync_dir(path)


def make_dir(path: Path) -> None:
    """Make a folder and what is missing above it, each entry durable."""
    with _explained("create", path):
        ops.make_dir(path)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with _explained("remove", path):
        ops.remove(path)


def move(source: Path, target: Path) -> None:
    """Give a file another name, durably. The caller sees to it that `target` is free."""
    with _explained("move", source):
        ops.rename(source, target)
    sync_dir(target.parent)
    sync_dir(source.parent)


def link(source: Path, target: Path) -> bool:
    """Give a file a second name; False where the file system cannot."""
    with _explained("link", target):
        try:
            ops.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
    return True


def names(directory: Path) -> list[str]:
    """Names in a directory, sorted; none where there is no such directory."""
    with _explained("list", directory):
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []


def size_of(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none (links and devices do not count)."""
    with _explained("look at", path):
        try:
            info = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def modified(path: Path) -> float:
    """When the file was last written, in seconds since 1970. For people; nothing is ordered by it."""
    with _explained("look at", path):
        return path.lstat().st_mtime


def read(path: Path, size: int) -> bytearray:
    """The first `size` bytes of a regular file; fewer where it is shorter."""
    buffer = bytearray(size)
    with _explained("read", path):
        # O_NONBLOCK: a pipe put in the file's place must not hang the reader
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as file:
            done = 0
            while done < size:
                count = file.readinto(memoryview(buffer)[done:])
                if not count:
                    break
                done += count
    return buffer[:done] if done < size else buffer


def take_lock(lock: FileLock, text: str) -> bool:
    """Take a lock without waiting and write in its file who holds it; False when another process has it.

    Raises LockError where the file system has no locks.
    """
    with _explained("lock", lock.path):
        try:
            if not lock.acquire():
                return False
        except NoLocksError as error:
            raise LockError(
                f"the file system of {lock.path.parent} has no file locks ({error.strerror}), so two writers could "
                "damage each other's commits. Set checkpoint.dir to a local disk.",
                path=lock.path,
            ) from error
        try:
            lock.write(text)
        except BaseException:
            lock.release()
            raise
    return True


@contextlib.contextmanager
def _explained(verb: str, path: Path, need: int | None = None) -> Iterator[None]:
    """Turn an OSError into an error that says what failed, what is intact and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot {verb} {path}: no such file or folder.", path=path) from error
    except OSError as error:
        intact = "The commits already in the store are intact."
        if error.errno in NO_SPACE:
            raise SpaceError(
                f"no space to {verb} {path} ({error.strerror}): {_sizes(path, need)}. {intact} Make room, or set "
                "checkpoint.keep_last lower, then run the same command again: it resumes.",
                path=path,
            ) from error
        raise CheckpointError(
            f"cannot {verb} {path}: {error.strerror or error}. {intact} Check the disk and the permissions "
            "of the folder, then run the same command again.",
            path=path,
        ) from error


def _sizes(path: Path, need: int | None) -> str:
    needed = f"need {need:,} bytes, " if need is not None else ""
    try:
        folder = next(folder for folder in path.parents if folder.is_dir())
        return f"{needed}have {shutil.disk_usage(folder).free:,} bytes on the disk"
    except OSError:
        return f"{needed}and the free space is unknown"
