"""Fuzzing of every reader of files: whole files, changed by chance where it hurts, are taken or refused by name.

Each kind is read in a child of its own that may use little more memory than it has, so that a crash, a hang or a bomb is
noticed with its input. An input follows from (seed, kind, number) alone. One that fails is kept in
tests/faults/corpus/ and read again by every test run from then on.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from reliability.children import RAM_DISK, end_of, fork, prepare_to_fork
from reliability.fuzz_targets import TARGETS, Target

KEPT = Path(__file__).parents[2] / "tests" / "faults" / "corpus"
MOST_SECONDS = 1.0
"""Of processor time for one input."""
MOST_BYTES = 256 * 2**20
"""Memory that a child may take beyond what it began with, over all of its inputs."""
MOST_FAILURES = 20
"""Failures of a kind after which it is let go."""


class _Hang(BaseException):
    """An input took too long; no Exception, so that no reader takes it for one of its own."""


@dataclass
class Result:
    """What became of the inputs of one kind. `refused`: by the name of the error."""

    count: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_ms: float = 0.0
    slowest: int = 0
    """Number of the slowest input."""
    failures: list[str] = field(default_factory=list)


def run(
    count: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    *,
    first: int = 0,
    seconds: float = float("inf"),
    keep: Path = KEPT,
) -> dict[str, Any]:
    """Read `count` inputs, shared out over the kinds; the failures among them are written to `keep`.

    `first`: number of the first input of each kind. `seconds`: wall time after which no further kind is begun.
    """
    chosen = {name: TARGETS[name] for name in kinds or TARGETS}
    total = sum(target.share for target in chosen.values())  # type: ignore[attr-defined]
    began, results = time.monotonic(), {}
    prepare_to_fork()
    for name, target in chosen.items():
        if time.monotonic() - began < seconds:
            share = max(1, round(count * target.share / total))  # type: ignore[attr-defined]
            results[name] = _fuzz(name, range(first, first + share), seed, keep)
    return {
        "inputs": sum(result.count for result in results.values()),
        "accepted": sum(result.accepted for result in results.values()),
        "refused": sum(sum(result.refused.values()) for result in results.values()),
        "seed": seed,
        "kinds": {name: vars(result) for name, result in results.items()},
        "slowest_ms": max((result.slowest_ms for result in results.values()), default=0.0),
        "kept": len(list(keep.glob("*"))) if keep.is_dir() else 0,
        "failures": [line for result in results.values() for line in result.failures],
    }


def input_of(target: Target, seed: int, kind: str, number: int) -> tuple[str, bytes]:
    """The input with this number: which file it stands for, and its bytes."""
    draw = random.Random(
        int.from_bytes(hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()[:8], "little")
    )
    sample = target.samples[draw.randrange(len(target.samples))]
    return sample.name, sample.changed(draw)


def read(target: Target, name: str, data: bytes) -> str:
    """The name of the error that refuses an input; empty where it is taken. Anything else is raised."""
    try:
        target.read(name, data)
    except target.errors as error:
        if not str(error):
            raise AssertionError(f"{type(error).__name__} says nothing") from error
        return type(error).__name__
    return ""


def replay(path: Path) -> str:
    """Read a kept input, in this process; see `read`."""
    kind, name, _ = path.name.split("--")
    folder = Path(tempfile.mkdtemp(prefix="stackwise-fuzz-"))
    try:
        return read(TARGETS[kind](folder), name, path.read_bytes())
    finally:
        shutil.rmtree(folder)


def _fuzz(kind: str, numbers: range, seed: int, keep: Path) -> Result:
    """All inputs of a kind. A child that dies is followed by one that goes on behind the input that killed it."""
    folder = Path(tempfile.mkdtemp(prefix="stackwise-fuzz-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    at = mmap.mmap(-1, 8)  # the number of the input that is being read, shared with the child
    whole, began = Result(), time.monotonic()
    try:
        while numbers and len(whole.failures) < MOST_FAILURES:
            log, told = folder / "log", folder / "result"
            at[:8] = b"\xff" * 8
            code = end_of(fork(_worker(kind, numbers, seed, folder, at, keep), log))
            if code == 0:
                part = json.loads(told.read_text())
                part["failures"] = whole.failures + part["failures"]
                part["count"] += whole.count
                whole = Result(**part)
                break
            stopped = int.from_bytes(at[:8], "little")
            if stopped not in numbers:
                raise RuntimeError(f"fuzzing {kind} did not begin: {log.read_text()}")
            reason = f"ended by signal {-code}" if code < 0 else log.read_text().strip().splitlines()[-1]
            files = folder / "again"
            files.mkdir()
            name, data = input_of(TARGETS[kind](files), seed, kind, stopped)
            shutil.rmtree(files)
            whole.failures.append(_failure(kind, seed, stopped, reason, data, keep, name))
            whole.count += stopped - numbers.start + 1
            numbers = range(stopped + 1, numbers.stop)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    whole.seconds = round(time.monotonic() - began, 1)
    return whole


def _worker(kind: str, numbers: range, seed: int, folder: Path, at: mmap.mmap, keep: Path) -> Any:
    """What the child does: read the inputs, and write down what became of them."""

    def work() -> None:
        files = folder / "files"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        target, result = TARGETS[kind](files), Result()
        for sample in target.samples:
            if read(target, sample.name, sample.data):
                raise AssertionError(f"the sample {sample.name!r} of {kind} is refused")
        _limit_memory()
        signal.signal(signal.SIGVTALRM, _too_long)
        for number in numbers:
            at[:8] = number.to_bytes(8, "little")
            _read_one(target, kind, seed, number, result, keep)
            if len(result.failures) >= MOST_FAILURES:
                break
        (folder / "result").write_text(json.dumps(vars(result)))

    return work


def _read_one(target: Target, kind: str, seed: int, number: int, result: Result, keep: Path) -> None:
    name, data = input_of(target, seed, kind, number)
    problem = ""
    began = time.thread_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * MOST_SECONDS)  # what Python can be told
    signal.setitimer(signal.ITIMER_REAL, 60)  # what it cannot be told ends the child
    try:
        refused = read(target, name, data)
        if refused:
            result.refused[refused] = result.refused.get(refused, 0) + 1
        else:
            result.accepted += 1
    except (Exception, _Hang) as error:  # noqa: BLE001 - whatever is not named is a failure
        problem = f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    spent = time.thread_time() - began
    result.count += 1
    if 1e3 * spent > result.slowest_ms:
        result.slowest_ms, result.slowest = round(1e3 * spent, 3), number
    if spent > MOST_SECONDS and not problem:
        problem = f"took {spent:.1f} seconds"
    if problem:
        result.failures.append(_failure(kind, seed, number, problem, data, keep, name))


def _failure(kind: str, seed: int, number: int, problem: str, data: bytes, keep: Path, name: str = "") -> str:
    """Keep the input; a line that says what happened and how to see it again."""
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f"{kind}--{name}--{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
    again = (
        f"python benchmarks/faults.py --only fuzz --kinds {kind} --seed {seed} --first {number} --inputs 1"
    )
    return f"{kind} {number}: {problem[:200]}; again: {again}"


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))


def _too_long(signum: int, frame: Any) -> NoReturn:
    raise _Hang(f"more than {2 * MOST_SECONDS:.0f} seconds of processor time")
