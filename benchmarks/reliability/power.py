"""Power loss: what a commit promised must be there in every state that a loss at any moment can leave.

The operations of some work (commits and prunes, a whole training run, a corpus, an activation store) are recorded, and
`disk_model` says what the disk may hold after each of them. Every such state is written to a folder and read by the code
that a user would run. What had been reported as done must be there whole; what had not may be missing, never damaged.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.children import RAM_DISK, Spent
from reliability.disk_model import Folder, Recorder, State, Trace, after, choices
from reliability.power_work import WORKS, Work

TRIES = 60
"""A work is recorded again with another seed until there are enough states, so many times at most."""


@dataclass
class Count:
    """States of one kind of work."""

    work: Work
    wanted: int
    states: int = 0
    """Different ones: other bytes on the disk, or another promise."""
    enumerated: int = 0
    recordings: int = 0
    ops: int = 0
    went_on: int = 0
    """States in which the work was taken up again and came to its proper end."""


def run(
    states: int,
    seed: int,
    *,
    seconds: float = float("inf"),
    works: Sequence[Work] = WORKS,
    first: int = 0,
) -> dict[str, Any]:
    """Check about `states` different states; the record. `first`: the recording to begin with, to repeat a miss."""
    spent = Spent()
    place = Path(tempfile.mkdtemp(prefix="stackwise-power-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    whole = sum(work.share for work in works)
    counts = [Count(work, round(states * work.share / whole)) for work in works]
    failures: list[str] = []
    try:
        for count in counts:
            for number in range(first, first + TRIES):
                if count.states >= count.wanted or spent.since()["seconds"] > seconds or len(failures) > 20:
                    break
                folder = place / f"{count.work.name.replace(' ', '-')}-{number}"
                folder.mkdir()
                failures += _record_and_check(
                    count, f"{seed}/{count.work.name}/{number}", number, folder, seed
                )
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "seed": seed,
        "asked": states,
        "states": sum(count.states for count in counts),
        "enumerated": sum(count.enumerated for count in counts),
        "went_on": sum(count.went_on for count in counts),
        "works": [
            {
                "work": count.work.name,
                "says": count.work.says,
                "recordings": count.recordings,
                "operations": count.ops,
                "states": count.states,
                "enumerated": count.enumerated,
                "went_on": count.went_on,
            }
            for count in counts
        ],
        "failures": failures,
        **spent.since(),
    }


def _record_and_check(count: Count, seed: str, number: int, place: Path, shown: int) -> Iterator[str]:
    """Record one work and check its states; a line for each that broke a promise, at most five."""
    draw = random.Random(seed)
    root = place / "root"
    root.mkdir()
    with Recorder(root) as recorder:
        check = count.work.do(root, draw, recorder.mark)
    trace = recorder.trace
    count.recordings += 1
    count.ops += len(trace.ops)
    again = (
        f"python benchmarks/faults.py --only power --work {count.work.name!r} --seed {shown} --first {number} "
        f"--states {min(count.wanted, count.work.most)}"
    )
    missed = 0
    folder = Folder(place / "after", place / "pool")
    for state, promised in _states(trace, draw, count):
        folder.show(state)
        goes_on = draw.random() < count.work.goes_on
        try:
            check(folder.root, promised)
            if goes_on:
                _go_on(check, folder.root, place / "on", promised)
                count.went_on += 1
        except Exception as error:  # noqa: BLE001 whatever breaks is a promise that was broken
            missed += 1
            yield (
                f"{count.work.name}, recording {number}, power lost at operation {state.end} of {len(trace.ops)} "
                f"({_fates(state)}): {type(error).__name__}: {error}; again: {again}"
            )
            if missed == 5:
                return


def _fates(state: State) -> str:
    """What became of the operations that were not safe, in a few words."""
    shown = [f"{index} {fate}" for index, fate in state.choice[:6]]
    return ", ".join(shown) + (f" and {len(state.choice) - 6} more" if len(state.choice) > 6 else "")


def _go_on(check: Callable[..., None], root: Path, copy: Path, promised: Sequence[str]) -> None:
    """Take the work up from a copy, which may be written to."""
    shutil.copytree(root, copy)
    for path in copy.rglob("*"):
        path.chmod(
            0o755 if path.is_dir() else 0o644
        )  # the pool's files are read-only, those of the work mostly not
    try:
        check(copy, promised, True)
    finally:
        shutil.rmtree(copy)


def _states(trace: Trace, draw: random.Random, count: Count) -> Iterator[tuple[State, list[str]]]:
    """States that differ from each other, each with what had been promised."""
    seen: set[tuple[bytes, int]] = set()
    # Not by what is missing still, so that one recording can be repeated by itself.
    aim = min(count.wanted, count.work.most)
    samples = max(2, 2 * aim // max(1, len(trace.ops)))
    ends = list(range(1, len(trace.ops) + 1))
    draw.shuffle(ends)
    promised: list[str] = []
    kept: dict[int, list[str]] = {}
    for end in range(1, len(trace.ops) + 1):
        op = trace.ops[end - 1]
        promised = [*promised, op.name] if op.kind == "mark" else promised
        kept[end] = promised
    quota = max(
        1, 2 * aim // len(ends)
    )  # per moment, so that a small count is spread over the whole work too
    for end in ends:
        new = 0
        listed = list(choices(trace, end, draw, samples))
        draw.shuffle(listed)
        for choice in listed:
            if new == quota or len(seen) == aim:
                break
            count.enumerated += 1
            state = after(trace, end, choice)
            key = (state.key, len(kept[end]))
            if key not in seen:
                seen.add(key)
                new += 1
                count.states += 1
                yield state, kept[end]
