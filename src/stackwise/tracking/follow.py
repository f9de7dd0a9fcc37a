"""A metrics file that another process writes, read as it grows."""

from __future__ import annotations

from pathlib import Path

from stackwise.tracking.metrics import MetricsLog, parse_line

__all__ = ["Follower"]

_TAIL = 256  # bytes before the place read up to: those of another text mean that the file was cut


class Follower:
    """Reads what was added since the last time. A file that was cut, as by a resume, is read anew.

    ``log`` holds the events so far; a line that is still being written is left for the next time. ``version`` changes
    with every change of the file and is "" while there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = ""
        self._forget()

    def _forget(self) -> None:
        self.log = MetricsLog()
        self._at, self._tail, self._lines = 0, b"", 0

    def update(self) -> bool:
        """Whether there was anything new. OSError where the file cannot be read; a missing one is an empty one."""
        try:
            facts = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return self._change("")
        version = f"{facts.st_ino}-{facts.st_size}-{facts.st_mtime_ns}"
        if version == self.version:
            return False
        with open(self.path, "rb") as file:
            file.seek(self._at - len(self._tail))
            if file.read(len(self._tail)) != self._tail or facts.st_size < self._at:
                self._forget()
                file.seek(0)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            self._lines += 1
            event, problem = parse_line(line)
            if event is not None:
                self.log.events.append(event)
            else:
                self.log.problems.append(f"{self.path.name} line {self._lines}: {problem}")
        self._at += len(whole)
        self._tail = (self._tail + whole)[-_TAIL:]
        return self._change(version)

    def _change(self, version: str) -> bool:
        changed, self.version = version != self.version, version
        if changed and not version:
            self._forget()
        return changed
