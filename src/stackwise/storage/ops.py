"""Every operation of the project that changes something on a disk.

What a crash, a power loss or a full disk leaves behind depends on the order of these calls, so they are all here, where
a test can record them, make them fail, or kill the process between two of them. The primitives to replace are `create`,
`open_to_change`, `write`, `pwrite`, `fsync`, `rename`, `link`, `unlink`, `truncate`, `mkdir` and `rmdir`; the rest is
made of them. Everything raises OSError, with the name of the file.

Needs a POSIX system: fsync of folders.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

try:
    from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined,unused-ignore]
except ImportError:
    F_FULLFSYNC = None

CRASH_VARIABLE = "STACKWISE_CRASH_AT"
"""Environment variable `name` or `name:n`: kill this process at the n-th passage of that crash point."""

KINDS = ("object", "manifest", "latest", "reference", "text", "export")
"""What is written whole or not at all. `latest` and `reference`: small files of the checkpoint store that can be made
again; `text`: single files of a run or a configuration; `export`: the files of a folder that appears at once."""
_MOMENTS = ("created", "partial", "written", "synced", "renamed")
CRASH_POINTS = (
    *(f"{kind}.{moment}" for kind in KINDS for moment in _MOMENTS),
    "objects.durable",
    "manifest.durable",
    "prune.manifest",
    "prune.manifests-durable",
    "prune.object",
    "repair.moved",
    "log.appended",
    "log.cut",
    "folder.filled",
    "folder.renamed",
)
"""Every place where a test can kill a writer."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit that is full."""

Chunk = bytes | bytearray | memoryview
_SMALL = 1 << 16
_passages: dict[str, int] = {}


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


# --- primitives ------------------------------------------------------------------------------------------------------


def create(path: Path, mode: int = 0o666) -> int:
    """Descriptor of a new file; FileExistsError where the name is taken, be it by a link."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)


def open_to_change(path: Path, mode: int = 0o666) -> int:
    """Descriptor of a file that is changed in place, made if it is missing; links and pipes are refused."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def write(fd: int, data: memoryview) -> int:
    """Bytes of `data` that were written: maybe fewer than all."""
    return os.write(fd, data)


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    """Bytes of `data` that were written at `offset`: maybe fewer than all."""
    return os.pwrite(fd, data, offset)


def fsync(fd: int) -> None:
    """Return once the file's bytes (or the folder's entries) are on the disk."""
    if F_FULLFSYNC is not None:
        fcntl(fd, F_FULLFSYNC)  # macOS: fsync leaves the bytes in the drive's cache
    else:
        os.fsync(fd)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name, in place of what had it, in one step."""
    source.rename(target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name; FileExistsError where that is taken."""
    target.hardlink_to(source)


def unlink(path: Path) -> None:
    """Remove one name."""
    path.unlink()


def truncate(fd: int, size: int) -> None:
    """Cut a file: one change of its entry, so a crash leaves the old length or the new one."""
    os.ftruncate(fd, size)


def mkdir(path: Path, mode: int = 0o777) -> None:
    """Make one folder; FileExistsError where the name is taken."""
    path.mkdir(mode)


def rmdir(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()


# --- what is made of them --------------------------------------------------------------------------------------------


def write_all(fd: int, data: Chunk) -> None:
    """Write every byte at the file's position."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[write(fd, rest) :]


def pwrite_all(fd: int, data: Chunk, offset: int) -> None:
    """Write every byte at `offset`. On an error the file is cut back to there."""
    whole, done = memoryview(data).cast("B"), 0
    try:
        while done < len(whole):
            done += pwrite(fd, whole[done:], offset + done)
    except OSError:
        with contextlib.suppress(OSError):
            truncate(fd, offset)
        raise


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path, mode: int = 0o777) -> None:
    """Make a folder and what is missing above it, each entry durable."""
    if path.is_dir():
        return
    if path.parent != path:
        make_dir(path.parent, mode)
    try:
        mkdir(path, mode)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    sync_dir(path.parent)


def remove(path: Path) -> None:
    """Remove a file, or a link, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; links are removed, not followed."""
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    for child in list(path.iterdir()):
        remove_tree(child)
    with contextlib.suppress(FileNotFoundError):
        rmdir(path)


def write_new(path: Path, chunks: Sequence[Chunk], *, kind: str, mode: int = 0o666) -> None:
    """A new file with these bytes, on the disk when this returns; its name becomes durable with `sync_dir`."""
    with NewFile(path, kind=kind, mode=mode) as file:
        for chunk in chunks:
            file.put(chunk)


def write_atomic(
    path: Path, chunks: Sequence[Chunk], *, kind: str, tmp_dir: Path | None = None, mode: int = 0o666
) -> None:
    """Make `path` hold `chunks` (of bytes); a crash leaves what was there before or all of it, never a part.

    The new name is durable only after `sync_dir(path.parent)`, which is left to the caller so that many files of one
    folder need one. `tmp_dir` must be on the same file system; null: the folder of `path`. `kind` names the crash
    points. After an error the temporary file is gone.
    """
    tmp = path.with_name(f".{path.name}.new") if tmp_dir is None else tmp_dir / f"{kind}-{path.name}"
    try:
        remove(tmp)
        try:
            write_new(tmp, chunks, kind=kind, mode=mode)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # After a failed fsync the kernel may drop the dirty pages and report the next fsync of the same file as
            # good. So never retry on that file: write a new one, once.
            remove(tmp)
            write_new(tmp, chunks, kind=kind, mode=mode)
        rename(tmp, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(tmp)
        if isinstance(error, OSError) and error.filename in (tmp, str(tmp), None):
            error.filename = str(path)  # the name that means something to who reads the message
        raise
    crashpoint(f"{kind}.renamed")


def replace_text(path: Path, text: str) -> None:
    """Make a file hold `text`, whole or not at all, durably. What UTF-8 cannot hold is written as an escape."""
    write_atomic(path, [text.encode("utf-8", errors="backslashreplace")], kind="text")
    sync_dir(path.parent)


class NewFile:
    """A file written piece by piece; on the disk when the block ends, gone when it fails."""

    def __init__(self, path: Path, *, kind: str, mode: int = 0o666) -> None:
        self.path, self._kind = path, kind
        self._small = bytearray()
        self._fd = create(path, mode)
        crashpoint(f"{kind}.created")

    def write(self, data: Chunk) -> None:
        """Add bytes; small pieces are collected."""
        whole = memoryview(data).cast("B")
        if len(whole) < _SMALL:
            self._small += whole
        if len(whole) >= _SMALL or len(self._small) >= _SMALL:
            self._flush()
        if len(whole) >= _SMALL:
            self.put(whole)

    def put(self, data: Chunk) -> None:
        """Add bytes at once."""
        write_all(self._fd, data)
        crashpoint(f"{self._kind}.partial")

    def _flush(self) -> None:
        if self._small:
            small, self._small = self._small, bytearray()
            self.put(small)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                crashpoint(f"{self._kind}.written")
                fsync(self._fd)
        except BaseException:
            kind = BaseException
            raise
        finally:
            os.close(self._fd)
            if kind is not None:
                with contextlib.suppress(OSError):
                    remove(self.path)
        crashpoint(f"{self._kind}.synced")


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end of the block, whole and durable, or vanishes.

    FileExistsError or ENOTEMPTY where `folder` holds something by then.
    """
    make_dir(folder.parent)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        mkdir(part)  # inside: a signal may come as soon as it is there
        yield part
        for inside, _, _ in os.walk(part):
            sync_dir(Path(inside))
        crashpoint("folder.filled")
        rename(part, folder)
        crashpoint("folder.renamed")
        sync_dir(folder.parent)
    finally:
        with contextlib.suppress(OSError):
            remove_tree(part)


class Log:
    """A file that grows at its end and may be cut; one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_to_change(path)
        self.size = os.fstat(self._fd).st_size

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def append(self, data: bytes) -> None:
        """Add bytes: all of them, or after an error none."""
        pwrite_all(self._fd, data, self.size)
        self.size += len(data)
        crashpoint("log.appended")

    def cut(self, size: int) -> None:
        """Drop everything after `size` bytes, durably."""
        if size < self.size:
            truncate(self._fd, size)
            self.size = size
            self.sync()
        crashpoint("log.cut")

    def sync(self) -> None:
        """Return once what was appended is on the disk."""
        fsync(self._fd)

    def close(self) -> None:
        """Sync and close; closing twice is allowed."""
        if not self.closed:
            fd, self._fd = self._fd, -1
            try:
                fsync(fd)
            finally:
                os.close(fd)
