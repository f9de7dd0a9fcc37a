"""Pictures of several runs: losses over what they cost, one colour for each group, mean and range over its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from stackwise.tracking import units
from stackwise.tracking.drawing import CYCLE, Plot, legend, running_mean, thin
from stackwise.tracking.groups import RunGroup, Spread
from stackwise.tracking.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["group_plots"]

_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
_MARKERS = "oDs"
"""Neighbours differ by dashes and markers as well, for eyes to which two of the colours are one."""
_FEW = 3
"""Groups whose names stand in every picture."""
_AROUND_GROWTH = ("before_growth", "after_growth")
_AXES = {
    "flops": (
        "FLOP",
        "compute",
        "Nats per token. Lines: running mean of the training loss, its range over the seeds "
        "shaded; marks: validation loss. At one place of the axis all have cost the same.",
    ),
    "tokens": (
        "tokens",
        "tokens",
        "The same losses over the tokens trained on, repetitions included. Colours as above.",
    ),
    "seconds": (
        "seconds",
        "seconds",
        "The same losses over the seconds of training on the machine that ran it. Colours as above.",
    ),
}


class _Line(NamedTuple):
    """A curve over the runs of a group: means, and the lowest and highest value at each place."""

    xs: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


def group_plots(groups: Sequence[RunGroup]) -> list[Plot]:
    """The plots that the groups have data for."""
    plots = []
    if any(run.steps for group in groups for run in group.counted):
        for against, (unit, name, caption) in _AXES.items():
            plots.append(
                Plot(
                    f"compared_{against}",
                    f"Loss against {name}",
                    caption,
                    partial(_losses, groups=groups, against=against, unit=unit),
                    wide=against == "flops",
                )
            )
    if any(_peak_and_loss(group) for group in groups):
        plots.append(
            Plot(
                "compared_memory",
                "Loss against peak memory",
                "Lines: the lowest running mean of the training loss that was reached within so many counted bytes "
                "(weights, gradients, moments, activations and buffers of the largest stage so far). Marks: the last "
                "validation loss at the most that the run took; bars: its range over the seeds. Lower left is better.",
                partial(_memory, groups=groups),
                wide=True,
            )
        )
    return plots


def _losses(axes: Axes, groups: Sequence[RunGroup], against: str, unit: str) -> None:
    seen: list[float] = []
    ends: list[float] = []
    for i, group in enumerate(groups):
        colour, dashes, marker = _look(i)
        training = _training(group, against)
        if training.xs:
            axes.fill_between(
                training.xs, training.lows, training.highs, color=colour, alpha=0.15, linewidth=0
            )
        label = units.printable(group.label)
        axes.plot(
            *thin(training.xs, training.means), color=colour, linestyle=dashes, linewidth=1.5, label=label
        )
        evals = _validation(group, against)
        axes.plot(
            evals.xs, evals.means, color=colour, linestyle="none", marker=marker, markersize=4, zorder=4
        )
        seen += [value for value in training.means if math.isfinite(value)]
        ends += [value for value in evals.means[-1:] if math.isfinite(value)]
    _crop(axes, seen, ends)
    axes.set_ylabel("loss, nats per token")
    axes.set_xlabel(unit)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: units.tick(value))
    if against == "flops" or len(groups) <= _FEW:
        legend(axes)


def _crop(axes: Axes, seen: list[float], ends: list[float]) -> None:
    """The steep fall at the beginning would squeeze what is compared into a line."""
    if not seen or not ends:
        return
    ordered = sorted(seen)
    high = max(ordered[int(0.85 * (len(ordered) - 1))], *ends)
    low = min(ordered[0], *ends)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _memory(axes: Axes, groups: Sequence[RunGroup]) -> None:
    seen: list[float] = []
    ends: list[float] = []
    for i, group in enumerate(groups):
        point = _peak_and_loss(group)
        if point is None:
            continue
        peak, loss = point
        colour, dashes, marker = _look(i)
        label = units.printable(group.label)
        reached = _over_runs([_within_memory(run) for run in group.counted])
        # A larger stage begins with what the smaller ones had reached: to the right first, then down.
        axes.plot(
            reached.xs,
            reached.means,
            drawstyle="steps-post",
            color=colour,
            linestyle=dashes,
            linewidth=1.5,
            alpha=0.8,
        )
        seen += reached.means
        ends += [loss.low, loss.high]
        axes.plot([peak.mean] * 2, [loss.low, loss.high], color=colour, linewidth=1.6)
        axes.plot(
            [peak.mean], [loss.mean], linestyle="none", marker=marker, markersize=7, color=colour, label=label
        )
    _crop(axes, seen, ends)
    axes.margins(x=0.08, y=0.12)
    axes.set_xlim(left=0)
    axes.set_ylabel("loss, nats per token")
    axes.set_xlabel("counted bytes at the most so far")
    axes.xaxis.set_major_formatter(lambda value, _: units.tick(value, "B"))
    legend(axes)


def _look(index: int) -> tuple[str, object, str]:
    """Colour, dashes and marker; the same three together come again after 18."""
    form = (index + index // len(CYCLE)) % len(_DASHES)
    return CYCLE[index % len(CYCLE)], _DASHES[form], _MARKERS[form]


def _peak_and_loss(group: RunGroup) -> tuple[Spread, Spread] | None:
    peak, loss = group.figures["peak_bytes"], group.figures["loss"]
    return None if peak is None or loss is None or not math.isfinite(loss.mean) else (peak, loss)


def _training(group: RunGroup, against: str) -> _Line:
    runs = []
    for run in group.counted:
        points: dict[int, tuple[float, float]] = {}
        for stage in run.stages:
            means = running_mean([event["loss"] for event in stage.steps])
            for event, mean in zip(stage.steps, means, strict=True):
                points[event["step"]] = (event[against], mean)
        runs.append(points)
    return _over_runs(runs)


def _within_memory(run: RunHistory) -> dict[int, tuple[float, float]]:
    """Step -> (counted bytes at the most so far, lowest running mean of the training loss so far)."""
    points: dict[int, tuple[float, float]] = {}
    peak, lowest = 0.0, math.inf
    for stage in run.stages:
        if stage.end is None:
            break
        peak = max(peak, stage.end["bytes"]["peak"])
        means = running_mean([event["loss"] for event in stage.steps])
        for event, mean in zip(stage.steps, means, strict=True):
            lowest = min(lowest, mean)
            if math.isfinite(lowest):
                points[event["step"]] = (peak, lowest)
    return points


def _validation(group: RunGroup, against: str) -> _Line:
    return _over_runs([_evals(run, against) for run in group.counted])


def _evals(run: RunHistory, against: str) -> dict[int, tuple[float, float]]:
    return {e["step"]: (e[against], e["loss"]) for e in run.evals if e["when"] not in _AROUND_GROWTH}


def _over_runs(runs: Sequence[dict[int, tuple[float, float]]]) -> _Line:
    """Mean and range at the steps that all runs have."""
    shared = sorted(set(runs[0]).intersection(*runs)) if runs else []
    line = _Line([], [], [], [])
    for step in shared:
        xs, ys = zip(*(run[step] for run in runs), strict=True)
        line.xs.append(sum(xs) / len(xs))
        line.means.append(sum(ys) / len(ys))
        line.lows.append(min(ys))
        line.highs.append(max(ys))
    return line
