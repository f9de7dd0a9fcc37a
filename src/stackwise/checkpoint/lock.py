"""One writer at a time."""

import datetime
import json
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import LockError

_held: "weakref.WeakSet[WriterLock]" = weakref.WeakSet()


class WriterLock:
    """The exclusive right to write to one store; readers need no lock and never wait for one.

    A kernel lock (flock) on the file `path`: it is gone as soon as the process that holds it is. Two
    WriterLocks of one process exclude each other too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self) -> None:
        """Take the lock or raise LockError at once, naming the host, process and start of the holder."""
        assert self._fd is None, "this lock is already held"
        fd = files.open_lock(self.path)
        try:
            if not files.try_lock(fd, self.path):
                raise LockError(self._refusal(), path=self.path)
            start = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
            files.fill_lock(fd, self.path, json.dumps(holder))
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _refusal(self) -> str:
        time.sleep(0.05)  # the holder may have locked the file and not yet written its name
        try:
            holder = json.loads(files.read(self.path, 4096))
            who = f"host {holder['host']}, pid {holder['pid']}, since {holder['start']}"
        except (ValueError, KeyError, TypeError):
            who = "a process that has not yet written its name"
        return (
            f"another process is writing to {self.path.parent}: {who}. Nothing was changed. Wait until it ends or "
            "stop it, or choose another training.run_id; reading (generate, eval, runs) is possible meanwhile."
        )


def _forget_in_child() -> None:
    # A forked child (a loader worker, say) inherits the descriptor and with it the lock: had the child
    # kept it, the lock would outlive a killed parent. Closing the copy does not unlock the parent's.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
