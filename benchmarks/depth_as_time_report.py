"""The table, verdicts and plot of depth as time, from the records that are there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- generated: depth-as-time -->", "<!-- end of depth-as-time -->"
WHOLE, CONTROL = "end to end", "control: one stack"
COLOURS = {"whole": "#24292f", "independent": "#2f6fde", "prepend": "#0d9488", "control": "#cf4577"}


class Rows:
    """The records of one number of stacks, by variant."""

    def __init__(self, stacks: int, records: Sequence[dict[str, Any]]) -> None:
        self.stacks = stacks
        self.found: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            # the one-stack control has everybody's budget, whatever number of stacks it was listed with
            if record["job"]["stacks"] == stacks or record["job"]["variant"] == CONTROL:
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
    lines += ["![NELBO against peak training bytes](depth-as-time.png)", ""]
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
            bytes_ratio >= 2.5,
            f"{n} stacks, at most 1/2.5 of its peak training bytes: {rows.peak(best) / 1e6:.2f} of "
            f"{rows.peak(WHOLE) / 1e6:.2f} MB (1/{bytes_ratio:.2f})"
            + ("" if n >= 3 else "; asked for from 3 stacks on"),
        ),
    ]
    for control in (CONTROL, "control: random partition"):
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
    """A panel per number of stacks: NELBO against the peak training bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(5.2 * max(1, len(tables)), 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, max(1, len(tables)), squeeze=False, sharey=True)[0]
        for axes, rows in zip(panels, tables, strict=False):
            numbered = [v for v in variants if v.name in rows.found]
            for number, variant in enumerate(numbered, start=1):
                control = variant.name.startswith("control")
                colour = COLOURS["control" if control else variant.kind]
                x, y = rows.peak(variant.name) / 1e6, rows.mean(variant.name)
                values = [record["nelbo"] for record in rows.found[variant.name]]
                axes.plot([x, x], [min(values), max(values)], color=colour, linewidth=1)
                axes.plot(x, y, "o", color=colour, markerfacecolor="white" if control else colour)
                side = 8 if number % 2 else -8
                axes.annotate(
                    str(number),
                    (x, y),
                    (side, 0),
                    textcoords="offset points",
                    va="center",
                    ha="center",
                    color=colour,
                )
            axes.set_title(f"{rows.stacks} stacks")
            axes.set_xlabel(
                "peak training bytes of a step, MB\n"
                + "\n".join(f"{i} {v.name}" for i, v in enumerate(numbered, start=1))
            )
            axes.set_xlim(left=0)
        panels[0].set_ylabel("NELBO, nats per character (bound)")
        figure.savefig(path, dpi=110)
