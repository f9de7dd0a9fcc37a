"""One writer at a time."""

import datetime
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import LockError
from stackwise.storage.lock import FileLock


class WriterLock:
    """The exclusive right to write to one store; readers need no lock and never wait for one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path, 0o644)

    @property
    def held(self) -> bool:
        return self._lock.held

    def acquire(self) -> None:
        """Take the lock or raise LockError at once, naming the host, process and start of the holder."""
        assert not self.held, "this lock is already held"
        start = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
        if not files.take_lock(self._lock, json.dumps(holder)):
            raise LockError(self._refusal(), path=self.path)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        self._lock.release()

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
