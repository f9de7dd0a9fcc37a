"""Faults made on purpose: kills, power loss, damaged bits, full disks, and what StackWise makes of them.

    python benchmarks/faults.py                         the counts that the tests use; minutes
    python benchmarks/faults.py --nightly               the long run whose records are committed
    python benchmarks/faults.py --only kills --kills 50 --seed 7
    python benchmarks/faults.py --nightly --out benchmarks/records/faults

With --out each kind of fault writes one JSON record, from which `python docs/generate.py` makes the tables of
docs/reliability.md. The exit code is 1 where a promise was not kept; every miss is printed with a command that makes the
same fault again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from reliability.children import Spent
from stackwise.tracking.environment import environment


def _kills(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import kills

    return kills.run(asked.kills, asked.seed, seconds=asked.seconds, first=asked.first, disk=asked.disk)


def _power(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import power, power_work

    works = [work for work in power_work.WORKS if asked.work in (None, work.name)]
    return power.run(asked.states, asked.seed, seconds=asked.seconds, works=works, first=asked.first)


def _fuzz(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import fuzz

    kinds = None if asked.kinds is None else asked.kinds.split(",")
    return fuzz.run(asked.inputs, asked.seed, kinds, first=asked.first, seconds=asked.seconds)


def _points(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import points

    return points.run(asked.passages, asked.seed, seconds=asked.seconds, only=asked.work)


def _flips(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import flips

    return flips.run(asked.flips, asked.seed, seconds=asked.seconds, only=asked.work, first=asked.first)


def _errors(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import errors

    return errors.run(asked.calls, asked.seed, seconds=asked.seconds, only=asked.work)


def _peers(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import peers

    return peers.run(asked.peers, asked.seed, seconds=asked.seconds)


def _mutants(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import mutants

    return mutants.run(asked.stops, asked.seed, seconds=asked.seconds, only=asked.work)


def _cost(asked: argparse.Namespace) -> dict[str, Any]:
    from reliability import cost

    return cost.run(asked.megabytes, asked.seed, disk=asked.disk)


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `count`: the option that says how many, with its value here and in the long run."""

    run: Callable[[argparse.Namespace], dict[str, Any]]
    says: str
    count: str = ""
    short: int = 0
    long: int = 0


KINDS = {
    "kills": Kind(_kills, "kill -9 at random times", "kills", 200, 10_000),
    "points": Kind(_points, "kill -9 at every named crash point", "passages", 1, 12),
    "power": Kind(_power, "power loss at every moment, modelled", "states", 2_000, 50_000),
    "peers": Kind(_peers, "the same on other ways of saving", "peers", 10, 200),
    "mutants": Kind(_mutants, "resumes that forget one thing", "stops", 1, 2),
    "cost": Kind(_cost, "what saving costs", "megabytes", 1, 512),
    "fuzz": Kind(_fuzz, "files of every kind, changed by chance", "inputs", 10_000, 1_000_000),
    "flips": Kind(_flips, "bits flipped, files cut, in every kind of file", "flips", 300, 10_000),
    "errors": Kind(_errors, "full, failing and forbidden disks", "calls", 1, 12),
}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Unset counts are those of the tests, or of the long run with --nightly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--nightly", action="store_true", help="the counts of the committed records")
    parser.add_argument("--only", metavar="KINDS", help=f"kinds of faults, with commas: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn at random")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most seconds per kind")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first run or draw, to repeat a miss"
    )
    parser.add_argument("--kinds", help="only files of these kinds, with commas, for fuzz")
    parser.add_argument("--work", help="only the work, or the kind of file, of this name")
    parser.add_argument("--disk", type=Path, help="folder on a disk, for what must not be in memory")
    parser.add_argument("--out", type=Path, help="folder of the records")
    for name, kind in KINDS.items():
        if kind.count:
            text = f"{name}: {kind.short:,} unless told, {kind.long:,} with --nightly"
            parser.add_argument(f"--{kind.count}", type=int, help=text)
    asked = parser.parse_args(arguments)
    asked.only = list(KINDS) if asked.only is None else [name.strip() for name in asked.only.split(",")]
    unknown = [name for name in asked.only if name not in KINDS]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is unknown; allowed: {', '.join(KINDS)}")
    for kind in KINDS.values():
        if kind.count and getattr(asked, kind.count) is None:
            setattr(asked, kind.count, kind.long if asked.nightly else kind.short)
    return asked


def record_of(name: str, asked: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """One kind of fault run, with what is needed to run it again."""
    spent = Spent()
    result = KINDS[name].run(asked)
    # without the folders of this machine
    places = {str(place) for place in (asked.out, asked.disk) if place is not None}
    words = [word for word in arguments if word not in {"--out", "--disk"} | places]
    facts = {key: value for key, value in environment().items() if key != "command"}
    return {
        "kind": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python benchmarks/faults.py", *words]),
        "environment": facts,
        **spent.since(),
        **result,
    }


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    asked = options(arguments)
    failed = False
    for name in asked.only:
        record = record_of(name, asked, arguments)
        failed = failed or bool(record["failures"])
        counts = {key: value for key, value in record.items() if isinstance(value, int | float)}
        verdict = f"{len(record['failures'])} FAILURES" if record["failures"] else "as promised"
        print(
            f"{name}: {verdict}; {', '.join(f'{key} {value:,}' for key, value in counts.items())}", flush=True
        )
        if asked.out is not None:
            asked.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record, indent=1, sort_keys=True) + "\n"
            (asked.out / f"{name}.json").write_text(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
