"""How pictures are drawn: PNG files for a folder, and SVG that takes its colours from the report's style sheet.

``matplotlib`` (``pip install "stackwise[train]"``) is imported when something is drawn. Its global state is left alone:
no pyplot, defaults restored around every drawing, so the same data give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise.storage import ops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "CYCLE", "Plot", "curve", "legend", "running_mean", "thin", "to_svg", "write_png"]

COLOURS = {
    "fg": "#24292f",
    "muted": "#66707b",
    "grid": "#dfe3e8",
    "paper": "#fffffe",
    "c0": "#2f6fde",
    "c1": "#0d9488",
    "c2": "#7c5cd6",
    "c3": "#c2820f",
    "c4": "#cf4577",
    "c5": "#4f962c",
}
"""Role -> colour on paper. In SVG each becomes ``var(--plot-<role>)``, so no two roles may share a colour."""

CYCLE = [COLOURS[f"c{i}"] for i in range(6)]
"""Colours to tell things apart by, in order."""
_POINTS = 1200  # a curve is thinned to about this many points
_NARROW, _WIDE = (4.7, 3.3), (10.2, 3.7)  # inches


@dataclass(frozen=True)
class Plot:
    """One picture. ``name`` is its file name without ending; ``wide``: worth the full width of a page."""

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], None]
    wide: bool = False


def write_png(plot: Plot, folder: str | Path) -> Path:
    """Draw ``plot`` to ``folder/<name>.png`` on white paper and return the path."""
    path = Path(folder) / f"{plot.name}.png"
    ops.make_dir(path.parent)
    with _figure(plot, wide=plot.wide) as figure:
        figure.suptitle(plot.title, x=0.008, ha="left", fontsize=11, fontweight="bold", color=COLOURS["fg"])
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=160, facecolor=COLOURS["paper"])
    ops.write_atomic(path, [picture.getbuffer()], kind="text")
    return path


def to_svg(plot: Plot, *, wide: bool = False) -> str:
    """``plot`` as an ``<svg>`` element to put into a page: transparent, text as text, colours as CSS variables."""
    buffer = io.StringIO()
    with _figure(plot, wide=wide) as figure:
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows the namespaces
    # Page-wide unique ids: the same clip path would otherwise be defined by the wide and the narrow drawing.
    prefix = f"{plot.name}-{'wide' if wide else 'narrow'}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = text.replace('xlink:href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for role, colour in COLOURS.items():
        text = text.replace(colour, f"var(--plot-{role})")
    # The size comes from the page; the picture keeps its proportions through its viewBox.
    label = f'role="img" aria-label="{plot.title}"'
    return re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', rf"<svg \1 {label}>", text, count=1)


@contextmanager
def _figure(plot: Plot, *, wide: bool) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": f"{plot.name}-{wide}",
                "text.parse_math": False,  # a "$" in a stage's name is a dollar
                "font.size": 9.5,
                "axes.labelsize": 9.5,
                "axes.titlesize": 11,
                "legend.fontsize": 8.5,
                "axes.edgecolor": COLOURS["muted"],
                "axes.labelcolor": COLOURS["muted"],
                "text.color": COLOURS["fg"],
                "xtick.color": COLOURS["muted"],
                "ytick.color": COLOURS["muted"],
                "grid.color": COLOURS["grid"],
                "grid.linewidth": 0.8,
                "axes.linewidth": 0.8,
                "path.simplify": False,
            }
        )
        figure = Figure(figsize=_WIDE if wide else _NARROW, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        plot.draw(axes)
        yield figure


def curve(axes: Axes, xs: list[float], ys: list[float], role: str, label: str | None = None) -> None:
    """Every point as a thin line, their running mean as a thick one; a lone point as a dot."""
    axes.plot(*thin(xs, ys), color=COLOURS[role], linewidth=0.7, alpha=0.35)
    dot = "o" if len(xs) == 1 else None
    axes.plot(
        *thin(xs, running_mean(ys)), color=COLOURS[role], linewidth=1.7, marker=dot, markersize=3, label=label
    )  # fmt: skip


def legend(axes: Axes) -> None:
    """Above the axes, where no curve can run through it, in as many columns as there is room for."""
    labels = axes.get_legend_handles_labels()[1]
    longest = max((len(label) for label in labels), default=0)
    width = axes.figure.get_figwidth()  # type: ignore[union-attr]
    room = width * 11  # characters, at about 11 to the inch
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=max(1, min(6, int(room / (longest + 4)))),
        handlelength=1.1, columnspacing=1.0, handletextpad=0.4, borderaxespad=0.2,
    )  # fmt: skip


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a twelfth of the points (of seven when they are few), narrower at both ends.

    Unlike an exponential mean it does not lag behind a falling curve. Values that are not finite are left out.
    """
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    half, last, means = max(len(values) // 24, min(3, len(values) // 8)), len(values) - 1, []
    for i in range(len(values)):
        reach = min(half, i, last - i)
        left, right = i - reach, i + reach + 1
        number = counts[right] - counts[left]
        means.append((sums[right] - sums[left]) / number if number else math.nan)
    return means


def thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over equal runs of points when there are more than can be seen."""
    width = math.ceil(len(xs) / _POINTS)
    if width <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs), width)
    return (
        [sum(xs[i : i + width]) / len(xs[i : i + width]) for i in starts],
        [sum(ys[i : i + width]) / len(ys[i : i + width]) for i in starts],
    )
