"""``metrics.jsonl``: one JSON object per line and per event, appended by one writer, cut on resume.

JSON has no NaN: a number that is not finite is written as the string "NaN", "Infinity" or "-Infinity" and comes
back as a float. The events are in the order of training, so ``step`` never falls from one line to the next; an event
without a step belongs to the step of the event before it. A ``checkpoint`` names the step whose state is durable now,
which may lie behind.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackwise.storage import ops
from stackwise.tracking.events import FIELDS, EventError, check_event

__all__ = [
    "FILE_NAME",
    "MetricsError",
    "MetricsFile",
    "MetricsLog",
    "last_step",
    "parse_line",
    "read_metrics",
]

FILE_NAME = "metrics.jsonl"

_LISTED = 3  # problems that a person is told of one by one

# After these the line must survive a power cut: a commit, or the end of something, has been announced.
_DURABLE = {"checkpoint", "stage_end", "run_end"}


class MetricsError(ValueError):
    """``metrics.jsonl`` cannot be used as it is; the message names the line and the way out."""


@dataclass
class MetricsLog:
    """What a metrics file holds. ``torn``: the last line was cut off in mid-write and is not in ``events``."""

    events: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    torn: bool = False

    @property
    def listed_problems(self) -> list[str]:
        """The first problems, and how many more there are."""
        more = len(self.problems) - _LISTED
        return self.problems[:_LISTED] + ([f"{FILE_NAME}: {more:,} more such lines"] if more > 0 else [])


@dataclass
class _Line:
    number: int
    end: int  # byte offset just after the line
    event: dict[str, Any] | None
    problem: str = ""


def read_metrics(path: str | Path, *, strict: bool = True) -> MetricsLog:
    """Read a metrics file, or the one in a run folder.

    A torn last line (a process or machine that died while writing) is left out and reported as ``torn``. Any other
    line that is not an event raises ``MetricsError``; with ``strict=False`` it is left out and described in
    ``problems``. A missing file raises ``FileNotFoundError``.
    """
    path = _file(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, so nothing is known of how the run went; `stackwise ckpt ls {path.parent}` lists its commits"
        )
    log = MetricsLog()
    lines = list(_lines(path))
    for line in lines:
        if line.event is not None:
            log.events.append(line.event)
        elif line is lines[-1]:
            log.torn = True
        elif strict:
            raise MetricsError(f"{path} {_damage(lines)}")
        else:
            log.problems.append(f"{path.name} line {line.number}: {line.problem}")
    return log


def _damage(lines: list[_Line]) -> str:
    """The first line that is no event, how many others are not, and the way out; the last line may be torn."""
    bad = [line for line in lines[:-1] if line.event is None]
    first = f"line {bad[0].number}: {bad[0].problem}"
    if len(bad) == 1:
        return f"{first}. The other lines are intact: delete line {bad[0].number} and run the command again."
    return (
        f"{first}. {len(bad) - 1:,} more of its {len(lines):,} lines are damaged and the others intact: "
        "delete the damaged ones and run the command again."
    )


def last_step(path: str | Path) -> int:
    """The last step that a metrics file knows of; -1 where there is none."""
    try:
        events = read_metrics(path, strict=False).events
    except FileNotFoundError:
        return -1
    return max((event["step"] for event in events if "step" in event), default=-1)


class MetricsFile:
    """The sink that appends events to ``metrics.jsonl`` in a run folder.

    Opening an existing file drops a torn last line and takes up after the rest. Every event is flushed; before
    checkpoints (``sync``), after them, and at the ends of stages and of the run the file is also synced to disk.
    Events whose step falls behind raise ``MetricsError``: the caller resumed without ``cut_after``.

    ``kept``: what ``fingerprint`` gave to the commit that is resumed. What was logged later is dropped unread: a power loss
    may have damaged it. A file that does not hold what the commit was made with is set aside, the lines that can still
    be read go on, and ``problem`` says so; null otherwise.
    """

    def __init__(self, run_dir: str | Path, kept: Mapping[str, Any] | None = None) -> None:
        self.path = _file(Path(run_dir) / FILE_NAME)
        self.problem: str | None = None
        self._last_step = 0
        self._last_logged_step = 0  # of "step" events, which must rise strictly
        self._log = ops.Log(self.path)
        if kept is not None and "metrics_bytes" in kept:
            self._log.cut(kept["metrics_bytes"])
            self._check(kept)
        self._log.cut(self._scan(None))
        self._hash = self._hash_again()

    def _check(self, kept: Mapping[str, Any]) -> None:
        content, sha256 = self.path.read_bytes(), kept.get("metrics_sha256")
        if sha256 is None or hashlib.sha256(content).hexdigest() == sha256:
            return
        number = itertools.count(1)
        aside = next(
            p for n in number if not (p := self.path.with_name(f"metrics.damaged-{n}.jsonl")).exists()
        )
        ops.write_atomic(aside, [content], kind="text")
        good = [
            line
            for line in content.splitlines(keepends=True)
            if line[-1:] == b"\n" and not parse_line(line)[1]
        ]
        self._log.close()
        ops.write_atomic(self.path, [b"".join(good)], kind="text")
        ops.sync_dir(self.path.parent)
        self._log = ops.Log(self.path)
        self.problem = (
            f"{self.path} was changed: it does not hold the {kept['metrics_bytes']:,} bytes that the commit was made "
            f"with. It was copied to {aside.name}, and the {len(good)} lines that can be read go on; a figure in them "
            "may be another one. The model does not depend on it."
        )

    def emit(self, event: Mapping[str, Any]) -> None:
        """Append one event and flush it."""
        step = event.get("step")
        if step is not None and event["event"] != "checkpoint":
            repeated = event["event"] == "step" and step == self._last_logged_step
            if step < self._last_step or repeated:
                raise MetricsError(
                    f"{self.path}: event {event['event']!r} of step {step} after one of step {self._last_step}. "
                    "A resumed run must first call cut_after(step of the checkpoint)."
                )
            self._note_step(event)
        line = json.dumps(_encode(event), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # errors="backslashreplace": a lone surrogate in a sample must not end the run
        data = line.encode("utf-8", errors="backslashreplace") + b"\n"
        self._log.append(data)
        self._hash.update(data)
        if event["event"] in _DURABLE:
            self._log.sync()

    def cut_after(self, step: int) -> int:
        """Drop every event of a step later than ``step``, return how many; the remaining bytes are untouched.

        ``cut_after(0)`` keeps what came before the first step.
        """
        before = sum(1 for _ in _lines(self.path))
        self._log.cut(self._scan(step))
        self._hash = self._hash_again()
        return before - sum(1 for _ in _lines(self.path))

    def size(self) -> int:
        """Bytes written so far; `cut_at` goes back to this point."""
        return self._log.size

    def fingerprint(self) -> dict[str, Any]:
        """What was logged so far: a commit notes it once `sync` has returned, and `kept` takes it."""
        return {"metrics_bytes": self._log.size, "metrics_sha256": self._hash.hexdigest()}

    def cut_at(self, size: int) -> None:
        """Drop everything written after the file was `size` bytes long; a shorter file is left as it is."""
        self._log.cut(size)
        self._log.cut(self._scan(None))
        self._hash = self._hash_again()

    def _hash_again(self) -> Any:
        return hashlib.sha256(self.path.read_bytes())

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        self._log.sync()

    def close(self) -> None:
        """Sync and close; closing twice is allowed."""
        self._log.close()

    def _scan(self, last_step: int | None) -> int:
        """Byte offset after the last event to keep (of step <= ``last_step``); sets the step counters."""
        self._last_step = self._last_logged_step = 0
        keep = 0
        lines = list(_lines(self.path))
        for line in lines:
            if line.event is None:
                if line is lines[-1]:
                    break
                raise MetricsError(f"{self.path} {_damage(lines)} The checkpoints are not affected.")
            step = line.event.get("step")
            if step is not None:
                if last_step is not None and step > last_step:
                    break
                self._note_step(line.event)
            keep = line.end
        return keep

    def _note_step(self, event: Mapping[str, Any]) -> None:
        self._last_step = max(self._last_step, event["step"])
        if event["event"] == "step":
            self._last_logged_step = event["step"]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _lines(path: Path) -> Iterator[_Line]:
    end = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            end += len(raw)
            if not raw.endswith(b"\n"):
                yield _Line(number, end, None, "the line does not end")
                return
            event, problem = parse_line(raw)
            yield _Line(number, end, event, problem)


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """The event of a line, or null and what is wrong with it."""
    try:
        event = json.loads(raw)
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(event, dict):
        return None, "not a JSON object"
    event = _decode(event)
    try:
        check_event(event, stored=True)
    except EventError as error:
        return None, str(error)
    return event, ""


def _encode(event: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _spell(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in event.items()
    }


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(event: dict[str, Any]) -> dict[str, Any]:
    fields = FIELDS.get(str(event.get("event")), {})
    for name, wanted in fields.items():
        if wanted.startswith("float") and event.get(name) in ("NaN", "Infinity", "-Infinity"):
            event[name] = float(event[name])
    return event
