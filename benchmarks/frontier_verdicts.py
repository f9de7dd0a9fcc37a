"""What the frontier was made to find out, read off its figures, whatever they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frontier_report import Row

CLOSE, SMALL = 1.01, 0.25
"""Claim 1: loss at most this much of end to end's, with this share of its bytes."""
FEWER_FLOPS = 0.85
FLAT = 0.05
"""Claim 3: peak bytes stay within this of their middle over all depths."""
CHEAPER = 2.0
PAYS_NATS, PAYS_ANSWERS = 0.05, 0.10
FLAT_ROWS = ("append, streamed", "append, streamed, cached", "cyclic, streamed")

Record = dict[str, Any]


def verdicts(rows: Sequence[Row], records: Sequence[Record], stacks: int) -> list[str]:
    """One line per claim."""
    return [depth_pays(rows, stacks), near_end_to_end(rows), growing(rows), flat(records), cascade(records)]


def verdict(holds: bool, text: str) -> str:
    return f"**{'Holds' if holds else 'Does not hold'}**: {text}"


def whole(rows: Sequence[Row]) -> list[Row]:
    """The rows with as many seeds as end to end: a claim does not rest on fewer."""
    return [row for row in rows if len(row.runs) >= len(rows[0].runs)]


def depth_pays(rows: Sequence[Row], stacks: int) -> str:
    deep = rows[0]
    shallow = [row for row in rows if "block" in row.variant.name and row.variant.group == "control"]
    if not shallow:
        return "Not measured: depth pays."
    best = min(shallow, key=lambda row: row.loss)
    nats = best.loss - deep.loss
    answers = deep.of("accuracy").mean - best.of("accuracy").mean
    return verdict(
        nats >= PAYS_NATS or answers >= PAYS_ANSWERS,
        f"depth pays. {stacks} stacks end to end reach {deep.loss:.4f}, the best shallow control ({best.variant.name}) "
        f"{best.loss:.4f} at equal FLOPs: {nats:.3f} nats and {100 * answers:.1f} points of answers between them.",
    )


def near_end_to_end(rows: Sequence[Row]) -> str:
    deep = rows[0]
    stackwise = [row for row in whole(rows) if row.variant.group in ("stack-wise", "growth")]
    small = [row for row in stackwise if row.peak <= SMALL * deep.peak]
    if not small:
        return verdict(
            False, f"no stack-wise curriculum stays within {SMALL:.0%} of end to end's peak bytes."
        )
    best = min(small, key=lambda row: row.loss)
    close = [row.variant.name for row in small if row.loss <= CLOSE * deep.loss]
    others = [name for name in close if name != best.variant.name]
    return verdict(
        bool(close),
        f"a quarter of the bytes, within 1 % of the loss. {best.variant.name} reaches {best.loss:.4f}, "
        f"{100 * (best.loss / deep.loss - 1):+.2f} % of end to end's {deep.loss:.4f} at equal FLOPs, with "
        f"{best.peak / 1e6:.2f} of {deep.peak / 1e6:.2f} MB ({100 * best.peak / deep.peak:.0f} %)"
        + (f"; so do {', '.join(others)}." if others else "."),
    )


def growing(rows: Sequence[Row]) -> str:
    deep = rows[0]
    budget = deep.of("flops").mean * FEWER_FLOPS
    grown = [r for r in whole(rows) if r.variant.group == "growth" and r.of("flops").mean <= budget]
    if not grown:
        return "Not measured: growth with 15 % fewer FLOPs."
    best = min(grown, key=lambda row: row.loss)
    fewer = 1 - best.of("flops").mean / deep.of("flops").mean
    return verdict(
        best.loss <= deep.loss,
        f"growth is as good with at least 15 % fewer FLOPs. {best.variant.name} reaches {best.loss:.4f} with "
        f"{100 * fewer:.1f} % fewer, end to end {deep.loss:.4f}.",
    )


def flat(records: Sequence[Record]) -> str:
    peaks = sweep(records)
    present = [label for label in FLAT_ROWS if label in peaks]
    if not present:
        return "Not measured: bytes against depth."
    parts, holds = [], True
    for label in present:
        values = list(peaks[label].values())
        middle = (max(values) + min(values)) / 2
        spread = (max(values) - min(values)) / 2 / middle
        holds = holds and spread <= FLAT
        parts.append(f"{label} ±{100 * spread:.1f} %")
    depths = sorted(peaks[present[0]])
    return verdict(
        holds,
        f"peak bytes without embedding and head are flat (±5 %) from {depths[0]} to {depths[-1]} stacks: "
        f"{', '.join(parts)}.",
    )


def cascade(records: Sequence[Record]) -> str:
    found = [r for r in records if r["job"].get("kind") == "cascade"]
    if not found:
        return "Not measured: the cascade of stored outputs."
    record = found[0]
    same = "identical" if record["identical"] else "different"
    return verdict(
        record["ratio"] >= CHEAPER and record["identical"],
        f"the cascade of stored outputs makes append at {record['job']['stacks']} stacks {record['ratio']:.2f} times cheaper "
        f"in CPU seconds per stage, with {same} losses at all {record['losses_compared']} steps (fp32).",
    )


# --- their tables ------------------------------------------------------------------------------------------------


def sweep(records: Sequence[Record]) -> dict[str, dict[int, int]]:
    """Curriculum -> stacks -> peak bytes on the device without embedding, final norm and head."""
    found: dict[str, dict[int, int]] = {}
    for record in records:
        job = record["job"]
        if job.get("kind") == "depth":
            peak = record["bytes"]["peak"] - record["outside_stacks"]
            found.setdefault(job["label"], {})[job["stacks"]] = peak
    return found


def depth_table(records: Sequence[Record]) -> list[str]:
    peaks = sweep(records)
    if not peaks:
        return ["No records yet.", ""]
    depths = sorted({n for row in peaks.values() for n in row})
    jobs = [r for r in records if r["job"].get("kind") == "depth"]
    host = {(r["job"]["label"], r["job"]["stacks"]): r["bytes"]["host"] for r in jobs}
    lines = [
        f"Peak MB on the device while one step of every stage trains; embedding, final norm and head "
        f"({jobs[0]['outside_stacks'] / 1e6:.3f} MB with gradients and moments) are left out. Last column: parked in host "
        f"memory at {depths[-1]} stacks.",
        "",
        "| stacks | " + " | ".join(map(str, depths)) + " | host MB |",
        "|---" * (len(depths) + 2) + "|",
    ]
    for label, row in peaks.items():
        cells = [f"{row[n] / 1e6:.2f}" if n in row else "–" for n in depths]
        parked = host.get((label, depths[-1]), 0)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {parked / 1e6:.2f} |")
    return [*lines, ""]


def cascade_table(records: Sequence[Record]) -> list[str]:
    found = [r for r in records if r["job"].get("kind") == "cascade"]
    if not found:
        return ["No record yet.", ""]
    record = found[0]
    recomputed, cached = (record["stage_cpu_seconds"][name] for name in ("recomputed", "cached"))
    chosen = [i for i in range(len(cached)) if i in (0, 1, 3, 7, 11, 15, len(cached) - 1)]
    rows = record["job"]["corpus"]["rows"]
    lines = [
        f"Append at {record['job']['stacks']} stacks, {record['steps']} steps a stage over {rows} rows, fp32, filling "
        "included; CPU seconds of a stage.",
        "",
        "| stage | " + " | ".join(str(i + 1) for i in chosen) + " | all |",
        "|---" * (len(chosen) + 2) + "|",
    ]
    for label, seconds in (("computed at every visit", recomputed), ("stored", cached)):
        lines.append(
            f"| {label} | " + " | ".join(f"{seconds[i]:.2f}" for i in chosen) + f" | {sum(seconds):.1f} |"
        )
    ratios = " | ".join(f"{recomputed[i] / cached[i]:.2f}" for i in chosen)
    return [*lines, f"| ratio | {ratios} | {record['ratio']:.2f} |", ""]
