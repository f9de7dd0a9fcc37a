"""Validation loss against peak training bytes: a row of panels per corpus, a panel per kind of equal budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from matplotlib.lines import Line2D

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(15, 5.2 * len(tables) + 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        names = list(dict.fromkeys(row.variant.name for _, rows, _ in tables for row in rows))
        numbers = {name: i for i, name in enumerate(names, start=1)}
        grid = figure.subplots(len(tables), len(PANELS), squeeze=False, sharey="row")
        for line, (title, rows, floor) in zip(grid, tables, strict=True):
            for axes, budget in zip(line, PANELS, strict=True):
                _panel(axes, budget, rows, floor, numbers)
            line[0].set_ylabel(f"{title}\nvalidation loss, nats per token")
        said = [f"{number} {name}" for name, number in numbers.items()]
        kinds = [
            Line2D(
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
        third = (len(said) + 2) // 3
        text = "\n".join("    ".join(said[i : i + third]) for i in range(0, len(said), third))
        figure.supxlabel(text, fontsize=8.5)
        figure.savefig(path, dpi=110)


def _panel(
    axes: Axes, budget: str, rows: Sequence[Row], floor: float | None, numbers: Mapping[str, int]
) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    points: list[tuple[float, float, str, str]] = []
    for row in rows:
        losses = _losses(row, budget)
        if not losses.values:
            continue
        kind, x = row.variant.group, row.peak / 1e6
        colour = COLOURS[kind]
        axes.plot([x, x], [min(losses.values), max(losses.values)], color=colour, linewidth=1)
        axes.plot(
            [x],
            [losses.mean],
            linestyle="none",
            marker=MARKERS[kind],
            color=colour,
            markersize=6,
            markerfacecolor="white" if kind == "control" else colour,
        )
        points.append((x, losses.mean, str(numbers[row.variant.name]), colour))
    axes.set_xscale("log")
    axes.margins(x=0.14, y=0.06)
    axes.set_xticks([2, 3, 5, 10, 20, 30])
    axes.set_xlim(axes.get_xlim())  # ticks outside the data must not widen the panel
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if floor is not None:
        axes.axhline(floor, color="#66707b", linewidth=0.8, linestyle=":")
        axes.annotate("entropy", (0.0, floor), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.set_xlabel("peak training bytes on the device, MB")
    axes.set_title(budget)
    axes.grid(axis="y", color="#dfe3e8", linewidth=0.6)
    axes.set_axisbelow(True)
    _number(axes, points)


def _number(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each point's number beside it, those of points one above the other apart from each other."""
    low, high = axes.get_ylim()
    gap = 0.033 * (high - low)
    clusters: list[list[tuple[float, float, str, str]]] = []
    for point in sorted(points):
        if clusters and point[0] / clusters[-1][-1][0] < 1.12:
            clusters[-1].append(point)
        else:
            clusters.append([point])
    for cluster in clusters:
        side, last = 1.09 * max(x for x, *_ in cluster), low
        for x, y, number, colour in sorted(cluster, key=lambda point: point[1]):
            last = max(y, last + gap)
            axes.annotate(
                number,
                (x, y),
                xytext=(side, last),
                va="center",
                fontsize=8,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3},
            )


def _losses(row: Row, budget: str) -> Spread:
    if budget == "equal FLOPs":
        return row.of("loss")
    return row.at_tokens if budget == "equal tokens" else row.at_seconds
