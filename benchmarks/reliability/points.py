"""kill -9 at every named crash point of `stackwise.storage.ops`, in every kind of work that passes it.

The work is first done once to count how often it passes each point. Then, for each point, it is done again in a child that
kills itself at the first, the last and some passages between, and what is left must hold the state before or the state
after, whole; the next process takes the work up and brings it to the end that it would have had.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from reliability.children import RAM_DISK, Spent, in_child, prepare_to_fork
from reliability.scenes import Scene, scenes
from stackwise.storage import ops


def run(
    passages: int, seed: int, *, seconds: float = float("inf"), only: str | None = None
) -> dict[str, Any]:
    """Kill at up to `passages` passages of each point in each work; the record. `only`: one work."""
    prepare_to_fork()
    spent = Spent()
    failures: list[str] = []
    rows = []
    reached: set[str] = set()
    place = Path(tempfile.mkdtemp(prefix="stackwise-points-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    try:
        for scene in scenes(place):
            if only not in (None, scene.name):
                continue
            try:
                counts = _passed(scene, place)
            except Exception as error:  # noqa: BLE001 whatever breaks is to be reported
                failures.append(f"{scene.name}, not killed at all: {type(error).__name__}: {error}")
                continue
            reached |= counts.keys()
            kills = 0
            for point, nth in _chosen(counts, passages, random.Random(f"{seed}/{scene.name}")):
                if spent.since()["seconds"] > seconds:
                    break
                kills += 1
                failures += _kill(scene, place, point, nth)
            rows.append({"work": scene.name, "says": scene.says, "points": len(counts), "kills": kills})
    finally:
        shutil.rmtree(place, ignore_errors=True)
    missing = sorted(set(ops.CRASH_POINTS) - reached)
    if missing and only is None:
        failures.append(f"crash points that no work passes: {', '.join(missing)}")
    return {
        "seed": seed,
        "asked": passages,
        "points": len(reached),
        "named": len(ops.CRASH_POINTS),
        "kills": sum(row["kills"] for row in rows),
        "works": rows,
        "failures": failures,
        **spent.since(),
    }


def _passed(scene: Scene, place: Path) -> Counter[str]:
    """How often the work passes each point when nobody kills it."""
    folder = place / "counted"
    folder.mkdir()
    counts: Counter[str] = Counter()
    try:
        scene.begin(folder)
        with patch.object(ops, "crashpoint", lambda name: counts.update([name])):
            scene.do(folder)
        scene.check(folder)
    finally:
        shutil.rmtree(folder)
    return counts


def _chosen(counts: Counter[str], most: int, draw: random.Random) -> Iterator[tuple[str, int]]:
    """The first and the last passage of each point, and others at random."""
    for point, count in sorted(counts.items()):
        between = range(2, count)
        some = draw.sample(between, min(max(0, most - 2), len(between)))
        for nth in sorted({1, *some, *([count] if most > 1 else [])}):
            yield point, nth


def _kill(scene: Scene, place: Path, point: str, nth: int) -> Iterator[str]:
    folder, log = place / "killed", place / "error.txt"
    folder.mkdir()
    again = f"python benchmarks/faults.py --only points --work {scene.name!r}"
    where = f"{scene.name}, killed at {point}:{nth}"
    try:
        scene.begin(folder)
        code = in_child(lambda: scene.do(folder), log, {ops.CRASH_VARIABLE: f"{point}:{nth}"})
        if code != -signal.SIGKILL:
            text = log.read_text()[-500:] if log.exists() else ""
            yield f"{where}: the child ended with {code} {text}; again: {again}"
            return
        scene.check(folder)
    except Exception as error:  # noqa: BLE001 whatever breaks is to be reported
        yield f"{where}: {type(error).__name__}: {error}; again: {again}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
