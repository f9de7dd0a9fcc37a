"""Power laws through what a comparison has come to: over its budgets, or over the sizes of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stackwise.planning.power_law import PowerLaw, TooFewPoints, fit_power_law
from stackwise.tracking import units
from stackwise.tracking.drawing import CYCLE, Plot, legend
from stackwise.tracking.gallery import gallery
from stackwise.tracking.groups import FIGURES, RunGroup
from stackwise.tracking.page import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stackwise.planning.contest import Contestant

__all__ = ["Fit", "fits", "scaling_section"]


class Measure(NamedTuple):
    """What a law is over: its letter, the figure of a run that it is, its name and its unit."""

    letter: str
    figure: str
    name: str
    unit: str


COMPUTE = Measure("C", "flops", "compute", "FLOP")
TOKENS = Measure("D", "tokens", "tokens", "tokens")
SIZE = Measure("N", "params", "size", "parameters")


@dataclass(frozen=True)
class Fit:
    """A law, or why there is none. `points`: (x, last validation loss) of every finished run."""

    label: str
    measure: Measure
    points: list[tuple[float, float]]
    law: PowerLaw | None
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.label}, L({self.measure.letter})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        law = self.law.to_dict() if self.law else None
        return {
            "label": self.label,
            "over": self.measure.figure,
            "points": self.points,
            "law": law,
            "problem": self.problem,
        }


def fits(contestants: Sequence[Contestant], groups: Sequence[RunGroup]) -> list[Fit]:
    """A law L(C) or L(D) for every entry that ran with several budgets, L(N) for every family of several sizes.

    `groups`: the runs of the contestants, in their order.
    """
    pairs = list(zip(contestants, groups, strict=True))
    found = []
    targets = list(dict.fromkeys(one.target for one in contestants))
    labels = list(dict.fromkeys(one.entry.label for one in contestants))
    if len(targets) > 1:
        over = COMPUTE if contestants[0].axis == "flops" else TOKENS
        found += [_fit(label, over, [g for one, g in pairs if one.entry.label == label]) for label in labels]
    for family in dict.fromkeys(one.entry.family for one in contestants):
        for target in targets:
            sizes = [g for one, g in pairs if (one.entry.family, one.target) == (family, target)]
            if len(sizes) > 1:
                unit = "FLOP" if contestants[0].axis == "flops" else "tokens"
                label = f"{family} at {units.tick(target)} {unit}" if len(targets) > 1 else family
                found.append(_fit(label, SIZE, sizes))
    return found


def _fit(label: str, measure: Measure, groups: Iterable[RunGroup]) -> Fit:
    points = [
        (float(x), run.eval_loss)
        for group in groups
        for run in (one.history for one in group.runs)
        if run.status == "done"
        and (x := FIGURES[measure.figure](run)) is not None
        and run.eval_loss is not None
        and math.isfinite(run.eval_loss)
    ]
    try:
        law = fit_power_law([x for x, _ in points], [loss for _, loss in points])
    except TooFewPoints as error:
        return Fit(label, measure, points, None, str(error))
    return Fit(label, measure, points, law)


def scaling_section(found: Sequence[Fit]) -> str:
    """The laws as a part of a page: a picture for each kind, and a table; "" without any."""
    if not found:
        return ""
    rows = []
    for fit in found:
        if fit.law is None:
            rows.append(
                f'<tr><th>{text(fit.name)}</th><td colspan="4" class="left">{text(fit.problem)}</td></tr>'
            )
            continue
        law = fit.law
        cells = [law.exponent.text(), law.irreducible.text(), f"{law.residual:.2g}", str(len(fit.points))]
        rows.append(
            f"<tr><th>{text(fit.name)}</th>" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
        )
    doubts = "".join(
        f'<p class="caption">{text(fit.name)}: {text("; ".join(fit.law.doubts))}.</p>'
        for fit in found
        if fit.law is not None and fit.law.doubts
    )
    plots = [
        Plot(
            f"scaling_{measure.figure}",
            f"Loss against {measure.name}, fitted",
            "One point per run. Lines: least squares; shaded: what 95 % of 1,000 resamples of the residuals say of the "
            "curve. A law holds within its points; beyond them it is a guess.",
            partial(_draw, listed=[fit for fit in found if fit.measure is measure], measure=measure),
            wide=True,
        )
        for measure in (COMPUTE, TOKENS, SIZE)
        if any(fit.measure is measure and fit.points for fit in found)
    ]
    heads = "".join(f"<th>{head}</th>" for head in ("Exponent a", "Irreducible E", "Residual", "Runs"))
    return (
        gallery("Scaling", plots)
        + '\n<p class="caption">L(x) = E + A x<sup>-a</sup>, E and A not below 0, in nats per token; in brackets the '
        "interval of 95 %.</p>\n"
        f'<div class="card scroll"><table>\n<thead><tr><th>Law</th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody></table></div>\n{doubts}"
    )


def _draw(axes: Axes, listed: Sequence[Fit], measure: Measure) -> None:
    for i, fit in enumerate(listed):
        colour = CYCLE[i % len(CYCLE)]
        xs, losses = zip(*fit.points, strict=True) if fit.points else ((), ())
        axes.plot(xs, losses, linestyle="none", marker="o", markersize=4.5, color=colour)
        if fit.law is not None:
            line = np.geomspace(min(xs), max(xs), 100)
            best, low, high = fit.law.at(line)
            axes.fill_between(line, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(line, best, color=colour, linewidth=1.5, label=units.printable(fit.label))
        else:
            axes.plot([], [], color=colour, marker="o", linestyle="none", label=units.printable(fit.label))
    axes.set_xscale("log")
    axes.grid(axis="x", which="major")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_xlabel(measure.unit)
    # The decades are too few to read a place by: the marks are where the points are.
    axes.set_xticks(_apart(sorted({x for fit in listed for x, _ in fit.points})))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: units.count(value))
    legend(axes)


def _apart(xs: Sequence[float]) -> list[float]:
    """Those that stand far enough from the one before to be labelled on an axis of logarithms."""
    kept: list[float] = []
    room = math.log(xs[-1] / xs[0]) / 9 if xs else 0.0
    for x in xs:
        if not kept or math.log(x / kept[-1]) >= room:
            kept.append(x)
    return kept
