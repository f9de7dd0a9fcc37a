"""The table, verdicts and plot of depth as time, from the records that are there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- generated: depth-as-time -->", "<!-- end of depth-as-time -->"
WHOLE, CONTROL = "end to end", "control: one stack"
CONTROLS = (CONTROL, "control: one stack, rows alike")
COLOURS = {"whole": "#24292f", "independent": "#2f6fde", "prepend": "#0d9488", "control": "#cf4577"}


class Rows:
    """The records of one number of stacks, by variant."""

    def __init__(self, stacks: int, records: Sequence[dict[str, Any]]) -> None:
        self.stacks = stacks
        self.found: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            # the one-stack controls have everybody's budget, whatever number of stacks it was listed with
            if record["job"]["stacks"] == stacks or record["job"]["variant"] in CONTROLS:
                self.found.setdefault(record["job"]["variant"], []).append(record)

    def mean(self, variant: str, key: str = "nelbo") -> float:
        return statistics.mean(float(record[key]) for record in self.found[variant])

    def peak(self, variant: str) -> float:
        return max(record["bytes"]["peak"] for record in self.found[variant])

    def seeds(self, variant: str) -> set[int]:
        return {record["job"]["seed"] for record in self.found[variant]}

    def differences(self, variant: str, other: str) -> list[float]:
        """NELBO less that of another row, for each seed that both have."""
        values = [{r["job"]["seed"]: r["nelbo"] for r in self.found[name]} for name in (variant, other)]
        return [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]

    def text(self, variant: str) -> str:
        values = [record["nelbo"] for record in self.found[variant]]
        mean = f"{statistics.mean(values):.4f}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def write_report(
    folder: Path, form: str, variants: Sequence[Any], records: list[dict[str, Any]]
) -> list[str]:
    """Write depth-as-time.md between its marks, and depth-as-time.png; returns what was found, for the terminal."""
    tables = [Rows(n, records) for n in sorted({record["job"]["stacks"] for record in records})]
    tables = [rows for rows in tables if WHOLE in rows.found]
    verdicts = [line for rows in tables for line in verdicts_of(rows, variants)]
    lines = [_head(form, records), "", "### What it shows", "", *[f"- {line}" for line in verdicts], ""]
    lines += ["![NELBO and peak training bytes of every row](depth-as-time.png)", ""]
    for rows in tables:
        lines += [f"### {rows.stacks} stacks", "", *_table(rows, variants), ""]
    lines += ["### The rows", "", *[f"- {variant.name}: {variant.says}" for variant in variants]]
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "depth-as-time.md"
    text = page.read_text("utf-8") if page.exists() else f"# Depth as time\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} lacks its marks {BEGIN} and {END}")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines).strip() + f"\n\n{END}{tail}", "utf-8")
    draw(folder / "depth-as-time.png", tables, variants)
    return verdicts


def verdicts_of(rows: Rows, variants: Sequence[Any]) -> list[str]:
    """Whether the best independent stacks are near end to end, small, and better than the controls."""
    independent = [v.name for v in variants if v.kind == "independent" and not v.name.startswith("control")]
    seeds = rows.seeds(WHOLE)
    independent = [name for name in independent if name in rows.found and rows.seeds(name) == seeds]
    if not independent:
        return []
    best = min(independent, key=rows.mean)
    loss, whole = rows.mean(best), rows.mean(WHOLE)
    bytes_ratio = rows.peak(WHOLE) / rows.peak(best)
    n = rows.stacks
    lines = [
        _verdict(
            loss <= 1.02 * whole,
            f"{n} stacks, within 2 % of end to end at equal FLOPs: {best} reaches {loss:.4f}, end to end {whole:.4f} "
            f"({100 * (loss / whole - 1):+.1f} %)",
        ),
        _verdict(
            bytes_ratio >= (2.5 if n >= 3 else 1),
            f"{n} stacks, {'at most 1/2.5 of' if n >= 3 else 'less than'} its peak training bytes: "
            f"{rows.peak(best) / 1e6:.2f} of {rows.peak(WHOLE) / 1e6:.2f} MB (1/{bytes_ratio:.2f})",
        ),
    ]
    for control in (*CONTROLS, "control: random partition"):
        if control in rows.found:
            other = rows.mean(control)
            pairs = rows.differences(best, control)
            spread = f"; by seed {min(pairs):+.4f} to {max(pairs):+.4f}" if len(pairs) > 1 else ""
            lines.append(
                _verdict(
                    loss < other,
                    f"{n} stacks, better than the {control}: {loss:.4f} against {other:.4f} ({loss - other:+.4f}{spread})",
                )
            )
    return lines


def _verdict(holds: bool, text: str) -> str:
    return f"**{'Holds' if holds else 'Does not hold'}**: {text}."


def _head(form: str, records: list[dict[str, Any]]) -> str:
    if not records:
        return f"Form `{form}`: no run yet."
    job = records[0]["job"]
    minutes = sum(record["cpu_seconds"] for record in records) / 60
    seeds = sorted({record["job"]["seed"] for record in records})
    return (
        f"Form `{form}`, {len(seeds)} seed{'s' * (len(seeds) > 1)}, characters of `{job['text']}`, stacks of 3 blocks, "
        f"width {job['width']}, context 64, batch 64; the one-stack control takes {job['steps']} steps. {len(records)} runs "
        f"took {minutes:.0f} CPU minutes. Every row has cost the same FLOPs. Mean, and range over the seeds in "
        "brackets."
    )


def _table(rows: Rows, variants: Sequence[Any]) -> list[str]:
    n, whole = rows.stacks, rows.mean(WHOLE)
    parts = " | ".join(f"{d}/{n} to {d + 1}/{n} hidden" for d in range(n))
    lines = [
        f"| | NELBO, nats per character (bound) | of end to end | {parts} | TFLOP | M tokens | CPU s | peak MB |",
        "|---" * (7 + n) + "|",
    ]
    for variant in variants:
        if variant.name not in rows.found:
            continue
        found = rows.found[variant.name]
        losses = [part_of(found, d / n, (d + 1) / n) for d in range(n)]
        cells = [
            f"*{variant.name}*" if variant.name.startswith("control") else variant.name,
            rows.text(variant.name),
            f"{100 * (rows.mean(variant.name) / whole - 1):+.1f} %",
            *(f"{loss:.3f}" for loss in losses),
            f"{rows.mean(variant.name, 'flops') / 1e12:.3f}",
            f"{rows.mean(variant.name, 'tokens') / 1e6:.2f}",
            f"{rows.mean(variant.name, 'cpu_seconds'):.0f}",
            f"{rows.peak(variant.name) / 1e6:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def part_of(found: Sequence[dict[str, Any]], low: float, high: float) -> float:
    """Mean masked loss over an interval of the share of hidden characters, from the losses by their number."""
    losses = [
        loss
        for record in found
        for count, loss in enumerate(record["by_count"], start=1)
        if low < count / len(record["by_count"]) <= high
    ]
    return statistics.mean(losses)


def draw(path: Path, tables: Sequence[Rows], variants: Sequence[Any]) -> None:
    """A panel per number of stacks, one row per variant, best on top: NELBO of each seed, their mean, peak bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    listed = [
        [
            v
            for _, _, v in sorted(
                (rows.mean(v.name), i, v) for i, v in enumerate(variants) if v.name in rows.found
            )
        ]
        for rows in tables
    ]
    heights = [max(2, len(names)) for names in listed] or [2]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}
        )
        figure = Figure(figsize=(8, 0.9 + 0.3 * sum(heights) + 0.4 * len(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for axes, rows, names in zip(panels, tables, listed, strict=False):
            for place, variant in enumerate(names):
                control = variant.name.startswith("control")
                colour = COLOURS["control" if control else variant.kind]
                values = [record["nelbo"] for record in rows.found[variant.name]]
                axes.plot(values, [place] * len(values), "|", color=colour, markersize=9)
                axes.plot(
                    rows.mean(variant.name),
                    place,
                    "o",
                    color=colour,
                    markerfacecolor="white" if control else colour,
                )
                size = f"{rows.peak(variant.name) / 1e6:.1f} MB"
                axes.annotate(
                    size,
                    (1, place),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    ha="right",
                    color=colour,
                )
            axes.set_yticks(range(len(names)), [variant.name for variant in names])
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(axis="x", color="#e5e7eb")
            axes.set_axisbelow(True)
            axes.margins(x=0.15)
            axes.set_title(f"{rows.stacks} stacks", loc="left", fontweight="bold")
        panels[-1].set_xlabel(
            "NELBO, nats per character (bound): means, seeds as ticks. Right: peak bytes of a step"
        )
        figure.savefig(path, dpi=110)
