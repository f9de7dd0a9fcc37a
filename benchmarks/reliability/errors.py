"""Disks that are full, failing or forbidden: an error at every call that changes something on a disk.

The works are those of `points`. Each is first done once to count its calls of every primitive of `stackwise.storage.ops`;
then it is done again with an error at one of them. It must end with the exit code for that error, or come to its end
where it can do without (a second try on a new file, an activation that is computed again); nothing temporary may be left;
and the next process finds the state before or the state after, whole, and brings the work to its proper end.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from reliability.children import RAM_DISK, Spent, end_of, fork, prepare_to_fork
from reliability.disk_model import PRIMITIVES
from reliability.scenes import Scene, scenes, training
from stackwise.cli.errors import exit_code
from stackwise.storage import ops

CODES = {errno.ENOSPC: {6}, errno.EDQUOT: {6}, errno.EIO: {3}, errno.EACCES: {2, 3}}
"""Exit codes that an error may end with. Without the right to write to the store it is 3, to other files 2."""
LIMITS = (400, 1500, 3000, 6000)
"""Bytes of a file at most, in the runs under a real limit."""


def run(calls: int, seed: int, *, seconds: float = float("inf"), only: str | None = None) -> dict[str, Any]:
    """Fail at up to `calls` calls of each primitive in each work; the record. `only`: one work.

    Up to 4 calls each gets one of the errors at random, from there on all of them.
    """
    prepare_to_fork()
    spent = Spent()
    failures: list[str] = []
    rows = []
    place = Path(tempfile.mkdtemp(prefix="stackwise-errors-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    try:
        for scene in _all(place):
            if only not in (None, scene.name):
                continue
            counts = _calls(scene, place)
            row = {"work": scene.name, "says": scene.says, "errors": 0, "ended": 0, "did_without": 0}
            for name, nth, code in _chosen(counts, calls, random.Random(f"{seed}/{scene.name}")):
                if spent.since()["seconds"] > seconds or len(failures) > 20:
                    break
                row["errors"] += 1
                again = f"python benchmarks/faults.py --only errors --work {scene.name!r} --seed {seed} --calls {calls}"
                try:
                    row[_fail(scene, place, name, nth, code)] += 1
                except Exception as error:  # noqa: BLE001 whatever breaks is to be reported
                    failures.append(
                        f"{scene.name}, {errno.errorcode[code]} at {name} number {nth}: {type(error).__name__}: {error}; "
                        f"again: {again}"
                    )
            rows.append(row)
        real = _real_limits(place, failures) if only is None else {}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "seed": seed,
        "asked": calls,
        "errors": sum(row["errors"] for row in rows),
        "works": rows,
        "real": real,
        "failures": failures,
        **spent.since(),
    }


def _all(place: Path) -> Iterator[Scene]:
    yield from scenes(place)
    changes = {"training.progressive.cache_ram_bytes": 0}
    yield training(
        "stored trunk",
        "a run with the activation store",
        place / "data",
        changes,
        case="append, stored trunk",
    )


def _calls(scene: Scene, place: Path) -> Counter[str]:
    folder = place / "counted"
    folder.mkdir()
    scene.begin(folder)
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in PRIMITIVES:
            original = getattr(ops, name)

            def call(*rest: Any, name: str = name, original: Any = original, **more: Any) -> Any:
                counts[name] += 1
                return original(*rest, **more)

            stack.enter_context(patch.object(ops, name, call))
        scene.do(folder)
    shutil.rmtree(folder)
    return counts


def _chosen(counts: Counter[str], most: int, draw: random.Random) -> Iterator[tuple[str, int, int]]:
    for name, count in sorted(counts.items()):
        for nth in sorted(draw.sample(range(1, count + 1), min(most, count))):
            codes = list(CODES) if most > 4 else [draw.choice(list(CODES))]
            for code in codes:
                yield name, nth, code


def _fail(scene: Scene, place: Path, name: str, nth: int, code: int) -> str:
    """Do the work with one failing call: `ended` as it should, or `did_without`."""
    folder = place / "failing"
    folder.mkdir()
    try:
        scene.begin(folder)
        original, count = getattr(ops, name), 0

        def call(*rest: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth:
                where = str(rest[0]) if isinstance(rest[0], Path) else None
                raise OSError(code, os.strerror(code), where)
            return original(*rest, **more)

        with patch.object(ops, name, call), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            wrong, outcome = None, "did_without"
            try:
                scene.do(folder)
            except Exception as error:  # noqa: BLE001 every kind of error is judged
                outcome = "ended"
                if exit_code(error) not in CODES[code]:
                    wrong = f"exit code {exit_code(error)}, not {sorted(CODES[code])}: {error!r}"
        if wrong is not None:
            raise AssertionError(wrong)
        if name != "unlink":  # what could not be removed is removed by the next writer
            left = [path for path in folder.rglob("*") if _temporary(path)]
            assert not left, f"left behind: {left}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            scene.check(folder)
        return outcome
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(path: Path) -> bool:
    return path.is_file() and (path.parent.name == "tmp" or path.name.endswith(".new"))


def _real_limits(place: Path, failures: list[str]) -> dict[str, Any]:
    """The same with errors of the system itself: a limit on the size of files, and a small disk."""
    scene = training("limits", "a whole run", place / "data", {})
    found: dict[str, Any] = {"limits": 0, "small_disks": 0}
    for limit in LIMITS:
        code, text = _under(scene, place, lambda limit=limit: _limit_files(limit), place / "limited")
        found["limits"] += 1
        if code != 6:
            failures.append(f"files of at most {limit} bytes: exit code {code}, not 6 {text}")
    for size in (128, 256, 400):
        disk = place / "small"
        disk.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
            found["small_disks"] = "not allowed here"
            break
        try:
            code, text = _under(scene, place, lambda: None, disk)
            found["small_disks"] += 1
            if code != 6:
                failures.append(f"a disk of {size} kB: exit code {code}, not 6 {text}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return found


def _under(scene: Scene, place: Path, limit: Any, folder: Path) -> tuple[int, str]:
    """The exit code of the work under a limit; what it leaves must be whole, and go on without the limit."""
    folder.mkdir(exist_ok=True)
    log = place / "error.txt"

    def do() -> None:
        limit()
        try:
            scene.do(folder)
        except Exception as error:
            error.exit_code = exit_code(error)  # type: ignore[attr-defined]
            raise

    code = end_of(fork(do, log))
    copy = place / "copied"
    shutil.copytree(folder, copy)
    try:
        scene.check(copy)
    except Exception as error:  # noqa: BLE001 reported with the code
        return code, f"and then {error!r}"
    finally:
        shutil.rmtree(copy)
        for path in folder.iterdir():
            shutil.rmtree(path)
    return code, log.read_text()[-300:] if log.exists() else ""


def _limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
