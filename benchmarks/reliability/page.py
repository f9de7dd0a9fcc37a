"""The tables of docs/reliability.md, from the records of benchmarks/records/faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[1] / "records" / "faults"
Record = dict[str, Any]


def tables(folder: Path = RECORDS) -> str:
    """One table over all kinds of faults, then one for each that has a record."""
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    head = ["kind of fault", "done", "misses", "seed", "date", "version", "command"]
    rows = [_row(name, says, records.get(name)) for name, says in KINDS.items()]
    parts = [_table(head, rows)]
    for name, make in DETAILS.items():
        if name in records:
            parts.append(f"### {KINDS[name][0].upper()}{KINDS[name][1:]}\n\n{make(records[name])}")
    return "\n\n".join(parts)


KINDS = {
    "kills": "kill -9 at random times",
    "points": "kill -9 at every crash point",
    "power": "power loss, modelled",
    "flips": "flipped bits and cut files",
    "errors": "full, failing and forbidden disks",
    "mutants": "resumes that forget one thing",
    "fuzz": "hostile files",
    "cost": "what it costs",
    "peers": "other ways of saving",
}


def _row(name: str, says: str, record: Record | None) -> list[str]:
    if record is None:
        return [says, "not yet", "", "", "", "", f"`python benchmarks/faults.py --nightly --only {name}`"]
    packages = record["environment"]["packages"]
    versions = f"StackWise {packages['stackwise']}, torch {packages['torch']}, Python {record['environment']['python']}"
    commit = (record["environment"].get("git") or {}).get("commit")
    versions += f", commit {commit[:10]}" if commit else ""
    return [
        says,
        DONE[name](record),
        f"{len(record['failures'])}"
        + (f", after {record['mended']} that were mended: see below" if "mended" in record else ""),
        str(record["seed"]),
        record["date"],
        versions,
        f"`{record['command']}`",
    ]


DONE: dict[str, Callable[[Record], str]] = {
    "kills": lambda r: f"{r['kills']:,} kills of {r['runs']:,} runs",
    "points": lambda r: f"{r['kills']:,} kills at {r['points']} of {r['named']} points",
    "power": lambda r: f"{r['states']:,} different states",
    "flips": lambda r: f"{r['flips']:,} flips, {r['cuts']:,} cuts, {r['others']:,} other damages",
    "errors": lambda r: f"{r['errors']:,} errors",
    "mutants": lambda r: f"{r['noticed']} of {r['mutants']} mutants noticed",
    "fuzz": lambda r: f"{r['inputs']:,} inputs",
    "cost": lambda r: "3 figures",
    "peers": lambda r: f"{r['asked']} kills, {5 * r['asked']:,} flips of each",
}


def _kills(record: Record) -> str:
    rows = [
        [
            row["case"],
            row["says"],
            f"{row['runs']:,}",
            f"{row['kills']:,}",
            f"{row['inexact']:,}",
            f"{row['redone'][0]}, {row['redone'][1]}",
        ]
        for row in record["cases"]
    ]
    head = ["run", "what it must not lose", "runs", "kills", "other ends", "steps redone at most"]
    note = (
        f"{record['asynchronous']:,} of the kills fell on runs that save from a thread, {record['on_disk']:,} on runs whose "
        "folder is on a disk and not in memory. Steps redone at most: without and with the thread."
    )
    return f"{_table(head, rows)}\n\n{note}"


def _points(record: Record) -> str:
    rows = [[row["work"], row["says"], str(row["points"]), f"{row['kills']:,}"] for row in record["works"]]
    return _table(["work", "", "points that it passes", "kills"], rows)


def _power(record: Record) -> str:
    rows = [
        [
            row["work"],
            row["says"],
            str(row["recordings"]),
            f"{row['operations']:,}",
            f"{row['states']:,}",
            f"{row['went_on']:,}",
        ]
        for row in record["works"]
    ]
    return _table(["work", "", "recordings", "operations", "states", "taken up again"], rows)


def _flips(record: Record) -> str:
    rows = [
        [
            row["kind"],
            row["says"],
            *(f"{row[name]:,}" for name in ("flips", "cuts", "others", "found", "harmless", "silent")),
        ]
        for row in record["kinds"]
    ]
    head = ["file", "", "flips", "cuts", "other", "found", "no effect", "silent"]
    note = (
        "Found: refused with an error of StackWise, or left out with a warning and computed again. No effect: what was read "
        "is bit for bit what the undamaged file gives. Other: zeros, a byte too many, another file, no file."
    )
    return f"{_table(head, rows)}\n\n{note}" + (f"\n\n{record['note']}" if "note" in record else "")


def _errors(record: Record) -> str:
    rows = [
        [row["work"], row["says"], *(f"{row[name]:,}" for name in ("errors", "ended", "did_without"))]
        for row in record["works"]
    ]
    real = record["real"]
    note = (
        f"Besides, with errors of the system itself: {real['limits']} runs under a limit on the size of files, and small "
        f"disks: {real['small_disks']}."
    )
    return f"{_table(['work', '', 'errors', 'ended by it', 'did without'], rows)}\n\n{note}"


def _mutants(record: Record) -> str:
    rows = [[row["lost"], row["instead"], f"{row['noticed']} of {row['stops']}"] for row in record["rows"]]
    return _table(["a resume that loses", "where there is no such state", "noticed"], rows)


def _fuzz(record: Record) -> str:
    rows = [
        [
            name,
            f"{found['count']:,}",
            f"{found['accepted']:,}",
            f"{sum(found['refused'].values()):,}",
            f"{found['slowest_ms']:.1f}",
        ]
        for name, found in sorted(record["kinds"].items())
    ]
    return _table(["file", "inputs", "read", "refused", "slowest, ms"], rows)


def _cost(record: Record) -> str:
    size = record["bytes"]
    rows = [
        [
            f"bytes written at the ends of {size['stacks']} append stages, against saving everything each time",
            f"{size['written'] / 1e6:.1f} of {size['full'] / 1e6:.1f} MB: {size['share']:.3f}",
            "at most 0.25",
        ]
    ]
    if "blocked" in record:
        stood = record["blocked"]
        rows.append(
            [
                "time that training stands still, the demo with a save every 100 steps",
                f"{1e3 * stood['blocked_seconds']:.1f} ms per save, {1e3 * stood['step_seconds']:.0f} ms per step: "
                f"{100 * stood['share']:.3f} %",
                "at most 1 %",
            ]
        )
    if "speed" in record:
        rate = record["speed"]
        rows.append(
            [
                f"speed of a commit of {rate['bytes'] / 1e6:,.0f} MB, against writing and syncing the same bytes",
                f"{rate['store'] / 1e6:,.0f} of {rate['plain'] / 1e6:,.0f} MB/s: {rate['share']:.2f}",
                "at least 0.9",
            ]
        )
    return _table(["", "measured", "wanted"], rows)


def _peers(record: Record) -> str:
    rows = [
        [
            f"{row['peer']} {row['version']}" if row["peer"] != "StackWise" else "StackWise",
            *(
                _of(row[kind], bad, sum(row[kind].values()))
                for kind, bad in (("kills", LOST), ("full", LOST), ("flips", ["other tensors"]))
            ),
        ]
        for row in record["peers"]
    ]
    head = [
        "saved by",
        "killed while overwriting: lost",
        "disk full while overwriting: lost",
        "one bit flipped: silent",
    ]
    note = (
        "Each saves the same 2.4 MB again and again under one name, as its users do, and does nothing else. Lost: nothing "
        "loads, or other tensors than any that were saved. Silent: other tensors load without an error."
    )
    return f"{_table(head, rows)}\n\n{note}"


LOST = ["nothing loads", "other tensors"]


def _of(outcomes: dict[str, int], bad: Iterable[str], whole: int) -> str:
    return f"{sum(outcomes.get(name, 0) for name in bad):,} of {whole:,}"


DETAILS: dict[str, Callable[[Record], str]] = {
    "kills": _kills,
    "points": _points,
    "power": _power,
    "flips": _flips,
    "errors": _errors,
    "mutants": _mutants,
    "fuzz": _fuzz,
    "cost": _cost,
    "peers": _peers,
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
