"""The pictures of a run: loss, throughput and memory, with the stages as bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stackwise.tracking import units
from stackwise.tracking.drawing import COLOURS, CYCLE, Plot, curve, legend
from stackwise.tracking.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["available_plots"]

_MANY_POINTS = 20  # of fewer none is cut off


def available_plots(run: RunHistory) -> list[Plot]:
    """The plots that ``run`` has data for."""
    plots = []
    if run.steps:
        told = "Nats per token. The thin line is each logged step, the thick one their running mean within a stage; shaded bands are the stages."
        if run.growths:
            told += " Diamonds are the validation loss just before and just after a growth."
        if len(run.steps) >= _MANY_POINTS:
            told += " The steep fall at the beginning lies above the picture."
        plots += [
            Plot(
                "loss_tokens",
                "Loss against tokens",
                told,
                partial(_loss, run=run, against="tokens", unit="tokens"),
                wide=True,
            ),
            Plot(
                "loss_flops",
                "Loss against compute",
                "The same losses over the floating-point operations spent, so that cheap stages look cheap.",
                partial(_loss, run=run, against="flops", unit="FLOP"),
            ),
            Plot(
                "throughput",
                "Throughput",
                "Training tokens per second at each logged step, and their running mean within a stage.",
                partial(_throughput, run=run),
            ),
        ]
    if any(stage.end for stage in run.stages):
        plots.append(
            Plot(
                "memory",
                "Counted memory by stage",
                "Bytes of the tensors a stage needs: parameters, their gradients, the optimizer's moments and the "
                "activations saved for the backward pass, each at its own most. Above a bar: the most held at once, "
                "which is less where they do not reach it together.",
                partial(_memory, run=run),
                wide=True,
            )
        )
    return plots


def _loss(axes: Axes, run: RunHistory, against: str, unit: str) -> None:
    _bands(axes, run, against)
    for i, stage in enumerate(s for s in run.stages if s.steps):
        xs, losses = _columns(stage.steps, against, "loss")
        curve(axes, xs, losses, "c0", "training" if i == 0 else None)
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
    legend(axes)


def _crop_loss(axes: Axes, run: RunHistory) -> None:
    """Cut the first steep fall off the top: everything after it would be squeezed into a line."""
    losses = sorted(event["loss"] for event in run.steps if math.isfinite(event["loss"]))
    evals = [event["loss"] for event in run.evals if event["step"] > 0 and math.isfinite(event["loss"])]
    if not losses:
        return
    steepest = 0.9 if len(losses) >= _MANY_POINTS else 1.0
    high = max([losses[int(steepest * (len(losses) - 1))], *evals])
    low = min([losses[0], *evals])
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2.5 * margin)  # the names of the stages stand in the upper margin


def _memory(axes: Axes, run: RunHistory) -> None:
    stages = [stage for stage in run.stages if stage.end]
    ends = [stage.end for stage in stages if stage.end]
    bottoms = [0.0] * len(ends)
    for item, colour in zip(
        ("parameters", "gradients", "moments", "activations", "buffers"), CYCLE, strict=False
    ):
        heights = [end["bytes"][item] for end in ends]
        if not any(heights):
            continue
        axes.bar(
            range(len(ends)), heights, bottom=bottoms, width=0.66, color=colour, label=item,
            edgecolor=COLOURS["paper"], linewidth=0.8,
        )  # fmt: skip
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    crowded = len(ends) > 2 * axes.figure.get_figwidth()  # type: ignore[union-attr]
    for i, end in enumerate(ends):
        axes.annotate(
            units.size(end["bytes"]["peak"]), (i, bottoms[i]), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=9 if len(ends) <= 6 else 7, rotation=90 if crowded else 0,
        )  # fmt: skip
    axes.set_xticks(range(len(ends)))
    axes.set_xlim(-0.6, max(len(ends), 3) - 0.4)
    # With eight bars or more a name has less than half an inch: the number of the stage says the same.
    short = len(ends) < 8 and max(len(stage.name) for stage in stages) <= 14
    axes.set_xticklabels([units.printable(stage.name) if short else str(stage.index + 1) for stage in stages])
    if not short:
        axes.set_xlabel("stage")
    axes.yaxis.set_major_formatter(lambda value, _: units.tick(value, "B"))
    axes.margins(y=0.3 if crowded else 0.12)
    legend(axes)


def _throughput(axes: Axes, run: RunHistory) -> None:
    from matplotlib.ticker import MaxNLocator

    _bands(axes, run, "step")
    for stage in run.stages:
        xs, rates = _columns(stage.steps, "step", "tokens_per_s")
        curve(axes, xs, rates, "c1")
    rates = sorted(event["tokens_per_s"] for event in run.steps)
    # From zero, for the ratio between stages is the point; one lucky first step must not set the scale.
    axes.set_ylim(0, 1.3 * (rates[int(0.99 * (len(rates) - 1))] or 1.0))
    axes.set_ylabel("tokens per second")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: units.tick(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


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
        colour = CYCLE[stage.index % len(CYCLE)]
        axes.axvspan(left, right, color=colour, alpha=0.11, linewidth=0)
        room = (right - left) / total * figure_width * 11  # characters that fit, at about 11 to the inch
        name = units.printable(stage.name)
        if len(name) > room:
            name = str(stage.index + 1)
        if len(name) <= room:
            axes.annotate(
                name, ((left + right) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, -4),
                textcoords="offset points", ha="center", va="top", fontsize=8.5, color=COLOURS["fg"], zorder=6,
                bbox={"facecolor": COLOURS["paper"], "alpha": 0.7, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axes.set_xlim(0, total * 1.006)  # the last marker whole


def _columns(events: Sequence[Any], *names: str) -> tuple[list[float], ...]:
    return tuple([event[name] for event in events] for name in names)
