"""The pictures of a run: PNG files for the folder, and SVG that takes its colours from the report's style sheet.

``matplotlib`` (``pip install "stackwise[train]"``) is imported when something is drawn. Its global state is left alone:
no pyplot, defaults restored around every drawing, so the same run folder gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.storage import ops
from stackwise.tracking import units
from stackwise.tracking.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Plot", "available_plots", "to_svg", "write_png"]

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

_CYCLE = [COLOURS[f"c{i}"] for i in range(6)]
_POINTS = 1200  # a curve is thinned to about this many points
_NARROW, _WIDE = (4.7, 3.3), (10.2, 3.7)  # inches


@dataclass(frozen=True)
class Plot:
    """One picture. ``name`` is its file name without ending; ``wide``: worth the full width of a page."""

    name: str
    title: str
    caption: str
    draw: Callable[[Axes, RunHistory], None]
    wide: bool = False


def available_plots(run: RunHistory) -> list[Plot]:
    """The plots that ``run`` has data for."""
    plots = []
    if run.steps:
        plots += [
            Plot(
                "loss_tokens",
                "Loss against tokens",
                "Nats per token. The thin line is each logged step, the thick one their running mean within a stage; "
                "shaded bands are the stages. Diamonds are the validation loss just before and just after a growth.",
                lambda axes, run: _loss(axes, run, "tokens", "tokens"),
                wide=True,
            ),
            Plot(
                "loss_flops",
                "Loss against compute",
                "The same losses over the floating-point operations spent, so that cheap stages look cheap.",
                lambda axes, run: _loss(axes, run, "flops", "FLOP"),
            ),
            Plot(
                "throughput",
                "Throughput",
                "Training tokens per second at each logged step, and their running mean within a stage.",
                _throughput,
            ),
        ]
    if any(stage.end for stage in run.stages):
        plots.append(
            Plot(
                "memory",
                "Counted memory by stage",
                "Bytes of the tensors a stage needs: parameters, their gradients, the optimizer's moments and the "
                "activations saved for the backward pass.",
                _memory,
                wide=True,
            )
        )
    return plots


def write_png(plot: Plot, run: RunHistory, folder: str | Path) -> Path:
    """Draw ``plot`` to ``folder/<name>.png`` on white paper and return the path."""
    path = Path(folder) / f"{plot.name}.png"
    ops.make_dir(path.parent)
    with _figure(plot, run, wide=plot.wide) as figure:
        figure.suptitle(plot.title, x=0.008, ha="left", fontsize=11, fontweight="bold", color=COLOURS["fg"])
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=160, facecolor=COLOURS["paper"])
    ops.write_atomic(path, [picture.getbuffer()], kind="text")
    return path


def to_svg(plot: Plot, run: RunHistory, *, wide: bool = False) -> str:
    """``plot`` as an ``<svg>`` element to put into a page: transparent, text as text, colours as CSS variables."""
    buffer = io.StringIO()
    with _figure(plot, run, wide=wide) as figure:
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
def _figure(plot: Plot, run: RunHistory, *, wide: bool) -> Iterator[Figure]:
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
        plot.draw(axes, run)
        yield figure


def _loss(axes: Axes, run: RunHistory, against: str, unit: str) -> None:
    _bands(axes, run, against)
    for i, stage in enumerate(s for s in run.stages if s.steps):
        xs, losses = _columns(stage.steps, against, "loss")
        _curve(axes, xs, losses, "c0", "training" if i == 0 else None)
    if run.evals:
        axes.plot(*_columns(run.evals, against, "loss"), color=COLOURS["c3"], linewidth=1.1, dashes=(4, 2))
        inside = [event for event in run.evals if event["when"] not in ("before_growth", "after_growth")]
        axes.plot(
            *_columns(inside, against, "loss"),
            color=COLOURS["c3"], linestyle="none", marker="o", markersize=4, label="validation",
        )  # fmt: skip
    for i, growth in enumerate(run.growths):
        pair = [event for event in (growth.before, growth.after) if event is not None]
        xs, losses = _columns(pair, against, "loss")
        axes.plot(xs, losses, color=COLOURS["c4"], linewidth=1.4, zorder=4)
        for event, face, label in (
            (growth.before, COLOURS["paper"], "before growth"),
            (growth.after, COLOURS["c4"], "after growth"),
        ):
            if event is not None:
                axes.plot(
                    [event[against]], [event["loss"]], linestyle="none", marker="D", markersize=5, zorder=5,
                    markerfacecolor=face, markeredgecolor=COLOURS["c4"], label=label if i == 0 else None,
                )  # fmt: skip
    _crop_loss(axes, run)
    axes.set_ylabel("loss, nats per token")
    axes.set_xlabel(unit)
    axes.xaxis.set_major_formatter(lambda value, _: units.tick(value))
    _legend(axes)


def _crop_loss(axes: Axes, run: RunHistory) -> None:
    """Cut the first steep fall off the top: everything after it would be squeezed into a line."""
    losses = sorted(event["loss"] for event in run.steps if math.isfinite(event["loss"]))
    evals = [event["loss"] for event in run.evals if event["step"] > 0 and math.isfinite(event["loss"])]
    if not losses:
        return
    high = max([losses[int(0.9 * (len(losses) - 1))], *evals])
    low = min([losses[0], *evals])
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2.5 * margin)  # the names of the stages stand in the upper margin


def _memory(axes: Axes, run: RunHistory) -> None:
    stages = [stage for stage in run.stages if stage.end]
    ends = [stage.end for stage in stages if stage.end]
    bottoms = [0.0] * len(ends)
    for item, colour in zip(
        ("parameters", "gradients", "moments", "activations", "buffers"), _CYCLE, strict=False
    ):
        heights = [end["bytes"][item] for end in ends]
        axes.bar(
            range(len(ends)), heights, bottom=bottoms, width=0.66, color=colour, label=item,
            edgecolor=COLOURS["paper"], linewidth=0.8,
        )  # fmt: skip
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for i, end in enumerate(ends):
        axes.annotate(
            units.size(end["bytes"]["peak"]), (i, bottoms[i]), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=9 if len(ends) <= 6 else 7,
        )  # fmt: skip
    axes.set_xticks(range(len(ends)))
    axes.set_xlim(-0.6, max(len(ends), 3) - 0.4)
    # With eight bars or more a name has less than half an inch: the number of the stage says the same.
    short = len(ends) < 8 and max(len(stage.name) for stage in stages) <= 14
    axes.set_xticklabels([units.printable(stage.name) if short else str(stage.index + 1) for stage in stages])
    if not short:
        axes.set_xlabel("stage")
    axes.yaxis.set_major_formatter(lambda value, _: units.tick(value, "B"))
    axes.margins(y=0.12)
    _legend(axes)


def _throughput(axes: Axes, run: RunHistory) -> None:
    _bands(axes, run, "step")
    for stage in run.stages:
        xs, rates = _columns(stage.steps, "step", "tokens_per_s")
        _curve(axes, xs, rates, "c1")
    rates = sorted(event["tokens_per_s"] for event in run.steps)
    # From zero, for the ratio between stages is the point; one lucky first step must not set the scale.
    axes.set_ylim(0, 1.3 * (rates[int(0.99 * (len(rates) - 1))] or 1.0))
    axes.set_ylabel("tokens per second")
    axes.set_xlabel("step")
    axes.yaxis.set_major_formatter(lambda value, _: units.tick(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _curve(axes: Axes, xs: list[float], ys: list[float], role: str, label: str | None = None) -> None:
    """Every point as a thin line, their running mean as a thick one; a lone point as a dot."""
    axes.plot(*_thin(xs, ys), color=COLOURS[role], linewidth=0.7, alpha=0.35)
    dot = "o" if len(xs) == 1 else None
    axes.plot(
        *_thin(xs, _running_mean(ys)), color=COLOURS[role], linewidth=1.7, marker=dot, markersize=3, label=label
    )  # fmt: skip


def _legend(axes: Axes) -> None:
    """Above the axes, where no curve can run through it."""
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, handlelength=1.1, columnspacing=1.0,
        handletextpad=0.4, borderaxespad=0.2,
    )  # fmt: skip


def _bands(axes: Axes, run: RunHistory, against: str) -> None:
    """Shade the stages along ``against`` and name them at the top."""
    stages = [stage for stage in run.stages if stage.steps]
    begin, bands = 0.0, []
    for stage in stages:
        end = float(stage.steps[-1][against])
        bands.append((stage, begin, end))
        begin = end
    total = begin or 1.0
    figure_width = axes.figure.get_figwidth()  # type: ignore[union-attr]
    for stage, left, right in bands:
        colour = _CYCLE[stage.index % len(_CYCLE)]
        axes.axvspan(left, right, color=colour, alpha=0.11, linewidth=0)
        room = (right - left) / total * figure_width * 11  # characters that fit, at about 11 to the inch
        name = units.printable(stage.name)
        if len(name) > room:
            name = str(stage.index + 1)
        if len(name) <= room:
            axes.annotate(
                name, ((left + right) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, -4),
                textcoords="offset points", ha="center", va="top", fontsize=8.5, color=colour,
            )  # fmt: skip
    axes.set_xlim(0, total * 1.006)  # the last marker whole


def _columns(events: Sequence[Any], *names: str) -> tuple[list[float], ...]:
    return tuple([event[name] for event in events] for name in names)


def _running_mean(values: Sequence[float]) -> list[float]:
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


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over equal runs of points when there are more than can be seen."""
    width = math.ceil(len(xs) / _POINTS)
    if width <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs), width)
    return (
        [sum(xs[i : i + width]) / len(xs[i : i + width]) for i in starts],
        [sum(ys[i : i + width]) / len(ys[i : i + width]) for i in starts],
    )
