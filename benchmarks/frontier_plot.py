"""Validation loss against peak training bytes: a row of panels per corpus, a panel per kind of equal budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from frontier_report import Row, Spread

COLOURS = {"reference": "#24292f", "stack-wise": "#2f6fde", "growth": "#0d9488", "control": "#cf4577"}
MARKERS = {"reference": "s", "stack-wise": "o", "growth": "^", "control": "o"}
PANELS = ("equal FLOPs", "equal tokens", "equal CPU seconds")


def draw(path: Path, tables: Sequence[tuple[str, Sequence[Row], float | None]]) -> None:
    """`tables`: title, rows and entropy floor of every corpus. Needs matplotlib (`pip install "stackwise[train]"`)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(15, 5.2 * len(tables) + 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(tables), len(PANELS), squeeze=False, sharey="row")
        for line, (title, rows, floor) in zip(grid, tables, strict=True):
            for axes, budget in zip(line, PANELS, strict=True):
                _panel(axes, budget, rows, floor)
            line[0].set_ylabel(f"{title}\nvalidation loss, nats per token")
        numbers = [f"{i + 1} {row.variant.name}" for i, row in enumerate(tables[0][1])]
        kinds = [
            matplotlib.lines.Line2D(
                [],
                [],
                linestyle="none",
                marker=MARKERS[kind],
                color=colour,
                label=kind,
                markerfacecolor="white" if kind == "control" else colour,
            )
            for kind, colour in COLOURS.items()
        ]
        figure.legend(handles=kinds, loc="outside upper center", ncols=len(kinds), frameon=False)
        half = (len(numbers) + 2) // 3
        text = "\n".join("    ".join(numbers[i : i + half]) for i in range(0, len(numbers), half))
        figure.supxlabel(text, fontsize=8.5)
        figure.savefig(path, dpi=110)


def _panel(axes: Axes, budget: str, rows: Sequence[Row], floor: float | None) -> None:
    places: list[tuple[float, float]] = []
    for number, row in enumerate(rows, start=1):
        losses = _losses(row, budget)
        if not losses.values:
            continue
        kind, x = row.variant.group, row.peak / 1e6
        axes.plot([x, x], [min(losses.values), max(losses.values)], color=COLOURS[kind], linewidth=1)
        axes.plot(
            [x], [losses.mean], linestyle="none", marker=MARKERS[kind], color=COLOURS[kind], markersize=6,
            markerfacecolor="white" if kind == "control" else COLOURS[kind],
        )  # fmt: skip
        places.append((x, losses.mean))
        crowd = sum(abs(a / x - 1) < 0.12 and abs(b - losses.mean) < 0.006 for a, b in places[:-1])
        axes.annotate(
            str(number), (x, losses.mean), xytext=(5 + 10 * crowd, 4), textcoords="offset points",
            fontsize=8, color=COLOURS[kind],
        )  # fmt: skip
    if floor is not None:
        axes.axhline(floor, color="#66707b", linewidth=0.8, linestyle=":")
        axes.annotate(
            "entropy", (1.0, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlabel("peak training bytes on the device, MB")
    axes.set_title(budget)
    axes.grid(axis="y", color="#dfe3e8", linewidth=0.6)
    axes.set_axisbelow(True)


def _losses(row: Row, budget: str) -> Spread:
    if budget == "equal FLOPs":
        return row.of("loss")
    return row.at_tokens if budget == "equal tokens" else row.at_seconds
