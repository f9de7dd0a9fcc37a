"""Every file operation of the checkpoint store, and nothing else.

The store's promise (a crash leaves the old commit or the new one, whole) rests on the order of the
calls in this module, so they are all here, where a test can record them, make them fail, or kill the
process between two of them. `write`, `fsync`, `rename` and `unlink` are the primitives to replace.

Needs a POSIX system: flock, and fsync of directories.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from stackwise.checkpoint.errors import CheckpointError, LockError, SpaceError

CRASH_VARIABLE = "STACKWISE_CRASH_AT"
"""Environment variable `name` or `name:n`: kill this process at the n-th passage of that crash point."""

_WRITES = ("object", "manifest", "latest")
_MOMENTS = ("created", "partial", "written", "synced", "renamed")
CRASH_POINTS = (
    *(f"{kind}.{moment}" for kind in _WRITES for moment in _MOMENTS),
    "objects.durable",
    "manifest.durable",
    "prune.manifest",
    "prune.manifests-durable",
    "prune.object",
)
"""Every place where a test can kill a writer."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_passages: dict[str, int] = {}

Chunk = bytes | memoryview


def crashpoint(name: str) -> None:
    """Die here by SIGKILL if the environment asks for it; otherwise do nothing."""
    assert name in CRASH_POINTS, name
    wanted = os.environ.get(CRASH_VARIABLE)
    if wanted is None:
        return
    point, _, nth = wanted.partition(":")
    if point == name:
        _passages[name] = _passages.get(name, 0) + 1
        if _passages[name] == int(nth or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def write(fd: int, data: memoryview) -> int:
    """Bytes of `data` that were written: maybe fewer than all."""
    return os.write(fd, data)


def fsync(fd: int) -> None:
    """Return once the file's bytes (or the directory's entries) are on the disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        # macOS: fsync leaves the bytes in the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def rename(source: Path, target: Path) -> None:
    """Replace `target` by `source` in one step."""
    source.rename(target)


def unlink(path: Path) -> None:
    """Remove one name."""
    path.unlink()


def write_atomic(path: Path, chunks: Sequence[Chunk], *, tmp_dir: Path, kind: str) -> None:
    """Make `path` hold `chunks` (of bytes); a crash leaves what was there before or all of it, never a part.

    The new name is durable only after `sync_dir(path.parent)`, which is left to the caller so that
    many files of one directory need one. `tmp_dir` must be on the same file system. `kind` names the
    crash points. Raises SpaceError or CheckpointError; the temporary file is gone then.
    """
    tmp = tmp_dir / f"{kind}-{path.name}"
    size = sum(len(chunk) for chunk in chunks)
    with _explained("write", path, need=size):
        try:
            try:
                _write_new(tmp, chunks, kind)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                # After a failed fsync the kernel may drop the dirty pages and report the next fsync of
                # the same file as good. So never retry on that file: write a new one, once.
                remove(tmp)
                _write_new(tmp, chunks, kind)
            rename(tmp, path)
        except BaseException:
            with contextlib.suppress(OSError, CheckpointError):
                remove(tmp)
            raise
    crashpoint(f"{kind}.renamed")


def _write_new(path: Path, chunks: Sequence[Chunk], kind: str) -> None:
    # Read-only from the start: stored files never change, they are only replaced or removed.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o444)
    try:
        crashpoint(f"{kind}.created")
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[write(fd, rest) :]
            crashpoint(f"{kind}.partial")
        crashpoint(f"{kind}.written")
        fsync(fd)
    finally:
        os.close(fd)
    crashpoint(f"{kind}.synced")


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    with _explained("sync", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fsync(fd)
        finally:
            os.close(fd)


def make_dir(path: Path) -> None:
    """Create a directory and what is missing above it, each entry durable."""
    if not path.is_dir():
        make_dir(path.parent)
        with _explained("create", path):
            path.mkdir(exist_ok=True)
        sync_dir(path.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with _explained("remove", path), contextlib.suppress(FileNotFoundError):
        unlink(path)


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


def open_lock(path: Path) -> int:
    """Open the lock file, created if need be, and return its descriptor."""
    with _explained("open", path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def try_lock(fd: int, path: Path) -> bool:
    """Take the exclusive lock without waiting. False when another process has it.

    The kernel frees it when the holder dies, so there are no stale locks. Raises LockError where the
    file system has no locks.
    """
    with _explained("lock", path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise LockError(
                f"the file system of {path.parent} has no file locks ({error.strerror}), so two writers could "
                "damage each other's commits. Set checkpoint.dir to a local disk.",
                path=path,
            ) from error
    return True


def fill_lock(fd: int, path: Path, text: str) -> None:
    """Say in the lock file who holds it."""
    with _explained("write", path):
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)


@contextlib.contextmanager
def _explained(verb: str, path: Path, need: int | None = None) -> Iterator[None]:
    """Turn an OSError into an error that says what failed, what is intact and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot {verb} {path}: no such file or folder.", path=path) from error
    except OSError as error:
        intact = "The commits already in the store are intact."
        if error.errno in _NO_SPACE:
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
