"""Bits that change by themselves, and files that lost their end: found before a tensor reaches a model, or harmless.

One file of one kind at a time is damaged, and then read as a user's command would read it. The reading must either fail
with an error of StackWise (or say that it leaves the file out), or give exactly what the undamaged file gives, which is
the case for what is made again anyway. A reading that gives something else is a failure, and so is an error that is not
StackWise's own.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.children import RAM_DISK, Spent
from reliability.flip_kinds import Kind, kinds
from reliability.runs import digest

SMALL = 8192
"""Files up to so many bytes are cut to every length, where the count allows it."""


@dataclass
class Count:
    """What became of the damages of one kind of file."""

    kind: Kind
    bytes: int
    """Size of its files together."""
    flips: int = 0
    cuts: int = 0
    others: int = 0
    found: int = 0
    harmless: int = 0
    failures: list[str] = field(default_factory=list)


def run(
    flips: int,
    seed: int,
    *,
    seconds: float = float("inf"),
    only: str | None = None,
    first: int = 0,
) -> dict[str, Any]:
    """Make about `flips` flips of one bit over all kinds of files, half as many cuts, and some other damages.

    `only`: one kind. `first`: number of the first damage, to repeat a miss.
    """
    spent = Spent()
    place = RAM_DISK if RAM_DISK.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="stackwise-flips-", dir=place) as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        chosen = [kind for kind in kinds(Path(folder)) if only in (None, kind.name)]
        whole = sum(kind.share for kind in chosen)
        counts = [Count(kind, sum(path.stat().st_size for path in kind.files)) for kind in chosen]
        for count in counts:
            wanted = math.ceil(flips * count.kind.share / whole)
            for damage in _damages(count, wanted, seed, first):
                _try(count, damage, seed)
                if spent.since()["seconds"] > seconds or len(count.failures) == 5:
                    break
    rows = [
        {
            "kind": count.kind.name,
            "says": count.kind.says,
            "files": len(count.kind.files),
            "bytes": count.bytes,
            "flips": count.flips,
            "cuts": count.cuts,
            "others": count.others,
            "found": count.found,
            "harmless": count.harmless,
            "silent": len(count.failures),
        }
        for count in counts
    ]
    return {
        "seed": seed,
        "asked": flips,
        **{name: sum(row[name] for row in rows) for name in ("flips", "cuts", "others", "found", "harmless")},
        "kinds": rows,
        "failures": [line for count in counts for line in count.failures],
        **spent.since(),
    }


@dataclass(frozen=True)
class Damage:
    """One change of one file. `content` null: the file is gone."""

    number: int
    path: Path
    says: str
    content: bytes | None


def _damages(count: Count, wanted: int, seed: int, first: int) -> Iterator[Damage]:
    """`wanted` flips, then cuts, then the rest. The same seed and number give the same damage."""
    files = [(path, path.read_bytes()) for path in count.kind.files]
    numbers = itertools.count()
    for number in itertools.islice(numbers, wanted):
        draw = random.Random(f"{seed}/{count.kind.name}/{number}")
        path, content = draw.choice([pair for pair in files if pair[1]])
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        if number >= first:
            count.flips += 1
            changed = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            yield Damage(number, path, f"bit {bit} of byte {at} flipped", changed)
    for number, (path, content, size) in zip(numbers, _cuts(files, wanted, seed), strict=False):
        if number >= first:
            count.cuts += 1
            yield Damage(number, path, f"cut to {size} bytes", content[:size])
    for number, (path, says, content_) in zip(numbers, _others(files, seed), strict=False):
        if number >= first:
            count.others += 1
            yield Damage(number, path, says, content_)


def _cuts(files: Sequence[tuple[Path, bytes]], wanted: int, seed: int) -> Iterator[tuple[Path, bytes, int]]:
    """All lengths of the smallest file, where it is small and the count is long, and half as many as the flips else."""
    draw = random.Random(f"{seed}/cuts")
    path, content = min((pair for pair in files if pair[1]), key=lambda pair: len(pair[1]))
    if len(content) <= min(SMALL, 20 * wanted):
        yield from ((path, content, size) for size in range(len(content)))
    for _ in range(wanted // 2):
        path, content = draw.choice([pair for pair in files if pair[1]])
        yield path, content, draw.randrange(len(content))


def _others(files: Sequence[tuple[Path, bytes]], seed: int) -> Iterator[tuple[Path, str, bytes | None]]:
    """Zeros, bytes too many, another file of the kind in its place, no file."""
    for path, content in files[:8]:
        draw = random.Random(f"{seed}/others/{path.name}")
        at = draw.randrange(max(1, len(content)))
        if any(content[at : at + 512]):
            yield (
                path,
                f"512 zeros at byte {at}",
                content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :],
            )
        yield path, "one byte too many", content + bytes([draw.randrange(256)])
        yield path, "gone", None
        for other, theirs in files[:8]:
            if theirs != content:
                yield path, f"{other.name} in its place", theirs
                break


def _try(count: Count, damage: Damage, seed: int) -> None:
    """Damage the file, read it, put it back, and note what came of it."""
    kind = count.kind
    content, mode = damage.path.read_bytes(), damage.path.stat().st_mode
    damage.path.unlink()
    if damage.content is not None:
        damage.path.write_bytes(damage.content)
        damage.path.chmod(mode)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            outcome = kind.read()
        same = digest({"": outcome}) == digest({"": kind.wanted})
        if same:
            count.harmless += 1
            return
        says = (
            ""
            if any("stackwise" in str(w.filename) for w in warned) and kind.warns
            else "read as if nothing were wrong"
        )
    except Exception as error:  # noqa: BLE001 every kind of error is judged
        own = type(error).__module__.startswith("stackwise.") or isinstance(error, FileNotFoundError)
        says = "" if own else f"{type(error).__name__}, which is no error of StackWise: {error}"
    finally:
        kind.restore()
        if damage.path.exists():
            damage.path.unlink()
        damage.path.parent.mkdir(parents=True, exist_ok=True)
        damage.path.write_bytes(content)
        os.chmod(damage.path, mode)
    if not says:
        count.found += 1
        return
    count.failures.append(
        f"{kind.name}: {damage.path.name}, {damage.says}: {says}; again: python benchmarks/faults.py --only flips "
        f"--work {kind.name!r} --seed {seed} --first {damage.number}"
    )
