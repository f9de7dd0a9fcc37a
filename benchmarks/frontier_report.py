"""The frontier's page: tables, verdicts on the claims, and the plot, all from the records."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from frontier_plot import draw
from frontier_scales import Scale, Setting
from frontier_variants import Variant, variants
from frontier_verdicts import cascade_table, depth_table, verdicts

BEGIN, END = "<!-- generated: frontier -->", "<!-- end of frontier -->"
NEAR = 0.1
"""A run whose CPU seconds are this close to end to end's stands for equal CPU seconds as it is."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    def text(self, show: Callable[[float], str], spread: bool = True) -> str:
        if not self.values:
            return "–"
        if len(self.values) == 1 or not spread:
            return show(self.mean)
        return f"{show(self.mean)} ({show(min(self.values))} to {show(max(self.values))})"


@dataclass(frozen=True)
class Row:
    """One variant on one corpus. `runs`: its records at equal FLOPs; losses at the other budgets beside them."""

    variant: Variant
    runs: Sequence[Record]
    at_tokens: Spread
    at_seconds: Spread

    def of(self, key: str) -> Spread:
        return Spread(tuple(run[key] for run in self.runs))

    @property
    def loss(self) -> float:
        return self.of("loss").mean

    @property
    def bytes(self) -> dict[str, int]:
        """Counted bytes; they do not depend on the seed."""
        return dict(self.runs[0]["bytes"])

    @property
    def peak(self) -> int:
        return self.bytes["peak"]


def rows_of(setting: Setting, records: Sequence[Record]) -> list[Row]:
    """The table of a corpus, in the order of the variants; those without a record are left out."""
    runs = [r for r in records if r["job"]["corpus"]["name"] == setting.corpus.name and "axis" in r["job"]]

    def found(name: str, axis: str) -> list[Record]:
        return [r for r in runs if r["job"]["variant"] == name and r["job"]["axis"] == axis]

    listed = variants(setting.stacks)
    references = {seed_of(r): r for r in found(listed[0].name, "flops")}
    rows = []
    for variant in listed:
        flops, tokens = found(variant.name, "flops"), found(variant.name, "tokens")
        if variant is listed[0]:
            tokens = flops  # what the others are made equal to
        if not flops:
            continue
        seconds = []
        for run in flops:
            near = [run, *(t for t in tokens if seed_of(t) == seed_of(run))]
            if seed_of(run) in references:
                loss = at_seconds(references[seed_of(run)]["cpu_seconds"], near)
                seconds += [] if loss is None else [loss]
        rows.append(Row(variant, flops, Spread(tuple(t["loss"] for t in tokens)), Spread(tuple(seconds))))
    return rows


def seed_of(record: Record) -> int:
    return int(record["job"]["keys"]["training.seed"])


def at_seconds(target: float, runs: Sequence[Record]) -> float | None:
    """The loss at `target` CPU seconds: between two runs of the same variant on the logarithm of their seconds.

    Every run is a whole schedule of its own. Null where `target` is not between two, nor within NEAR of one.
    """
    points = sorted((run["cpu_seconds"], run["loss"]) for run in runs)
    for (low, first), (high, second) in pairwise(points):
        if low <= target <= high and low < high:
            share = math.log(target / low) / math.log(high / low)
            return float(first + share * (second - first))
    near = [loss for seconds, loss in points if abs(seconds / target - 1) <= NEAR]
    return float(near[0]) if near else None


# --- tables ------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def quality(rows: Sequence[Row], floor: float | None) -> list[str]:
    """Losses at the three budgets, and what they cost."""
    known = floor is not None
    header = ["", "loss at equal FLOPs", *(["above the floor", "answers right"] if known else [])]
    header += ["at equal tokens", "at equal CPU seconds", "TFLOP", "M tokens", "CPU s", "peak MB"]
    lines = []
    for row in rows:
        loss = row.of("loss")
        cells = [mark(row.variant), loss.text(lambda v: f"{v:.4f}")]
        if floor is not None:
            right = row.of("accuracy").text(lambda v: f"{100 * v:.1f} %", spread=False)
            cells += [f"{loss.mean - floor:.4f}", right]
        cells += [
            row.at_tokens.text(lambda v: f"{v:.4f}", spread=False),
            row.at_seconds.text(lambda v: f"{v:.4f}", spread=False),
            f"{row.of('flops').mean / 1e12:.3f}",
            f"{row.of('tokens').mean / 1e6:.2f}",
            f"{row.of('cpu_seconds').mean:.0f}",
            megabytes(row.peak),
        ]
        lines.append(cells)
    return table(header, lines)


def memory(rows: Sequence[Row]) -> list[str]:
    """Bytes by item, each at its most, in the stage with the highest peak."""
    items = ("parameters", "gradients", "moments", "activations", "buffers")
    header = ["MB", "weights", *items[1:], "peak", "of end to end", "parked in host memory"]
    base = rows[0].peak
    lines = []
    for row in rows:
        counted = row.bytes
        cells = [row.variant.name, *(megabytes(counted[item]) for item in items)]
        cells += [megabytes(row.peak), f"{100 * row.peak / base:.0f} %", megabytes(counted["host"])]
        lines.append(cells)
    return table(header, lines)


def mark(variant: Variant) -> str:
    return f"*{variant.name}*" if variant.group == "control" else variant.name


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}"


# --- the page ----------------------------------------------------------------------------------------------------


def write_report(
    docs: Path, scale: Scale, settings: Sequence[Setting], records: Sequence[Record]
) -> list[str]:
    """Write frontier.md (between its markers) and frontier.png; returns the verdicts and where they went."""
    tables = {s.corpus.name: rows_of(s, records) for s in settings}
    tables = {name: rows for name, rows in tables.items() if rows and rows[0].variant.group == "reference"}
    if "depth" not in tables:
        return ["no report: end to end has no record yet"]
    depth = settings[0]
    floor = floor_of(depth)
    results = verdicts(tables["depth"], records, depth.stacks)
    lines = [
        about(scale, settings, tables),
        "",
        "### What it shows",
        "",
        *(f"- {line}" for line in results),
        "",
    ]
    lines += ["![Validation loss against peak training bytes](frontier.png)", ""]
    for setting in settings:
        rows = tables.get(setting.corpus.name)
        if not rows:
            continue
        known = floor if setting is depth else None
        lines += [f"### {TITLES[setting.corpus.name]}", ""]
        lines += quality(rows, known) + memory(rows)
    lines += ["### Bytes against depth", "", *depth_table(records), "### The cascade of stored outputs", ""]
    lines += [*cascade_table(records), "### The rows", "", *(legend(v) for v in variants(depth.stacks)), ""]
    page, plot = docs / "frontier.md", docs / "frontier.png"
    docs.mkdir(parents=True, exist_ok=True)
    text = page.read_text("utf-8") if page.exists() else f"# The frontier\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} must hold the lines {BEGIN!r} and {END!r} once each")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines).strip() + f"\n\n{END}{tail}", "utf-8")
    draw(plot, [(TITLES[name], rows, floor if name == "depth" else None) for name, rows in tables.items()])
    return [*results, f"wrote {page} and {plot}"]


TITLES = {"depth": "The language in which depth pays", "text": "Characters of a text"}


def floor_of(setting: Setting) -> float:
    """Nats per target that a model which knows the automaton pays on the held-out rows."""
    language = setting.corpus.language
    assert language is not None
    length = int(setting.base["training.seq_len"])
    return language.floor(language.rows(setting.corpus.held_out + 1, length, seed=200)[:-1])


def legend(variant: Variant) -> str:
    return f"- {mark(variant)}: {variant.says}"


def about(scale: Scale, settings: Sequence[Setting], tables: dict[str, list[Row]]) -> str:
    """What the figures below were taken with."""
    import torch

    base, depth = settings[0].base, settings[0]
    seconds = sum(run["cpu_seconds"] for rows in tables.values() for row in rows for run in row.runs)
    count = sum(len(row.runs) for rows in tables.values() for row in rows)
    return (
        f"Form `{scale.name}`, {len(scale.seeds)} seed{'s' * (len(scale.seeds) > 1)}, torch {torch.__version__.split('+')[0]}, "
        f"{platform.machine()}, one thread a run, {tables['depth'][0].runs[0]['dtype']}. {depth.stacks} stacks of one block, "
        f"width {base['model.d_model']}, context {base['training.seq_len']}, batch {base['training.batch_size']}; end to end "
        f"takes {depth.steps} steps on the language. {depth.corpus.rows:,} training rows, {depth.corpus.held_out} held out. "
        f"{count} runs at equal FLOPs took {seconds / 60:.0f} CPU minutes. Mean, and range over the seeds in brackets."
    )
