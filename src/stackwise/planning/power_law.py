"""Losses over compute or size, fitted by a power law with an irreducible part, and how sure the fit is.

    L(x) = E + A x^-a,   E >= 0, A >= 0

With E = 0 this is the law of Kaplan et al. 2020 (arXiv 2001.08361); with E one axis of that of Hoffmann et al. 2022
(arXiv 2203.15556, equation 2). For a fixed exponent E and A are linear, so only the exponent is searched for. The
uncertainty is a bootstrap over residuals (Efron 1979): each resample adds to the fitted values residuals drawn with
replacement, scaled up for the three parameters that were fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LEAST_POINTS", "Interval", "PowerLaw", "TooFewPoints", "fit_power_law"]

LEAST_POINTS = 4
"""Different values of x: three parameters go through any three points."""
_RESAMPLES, _LEVEL = 1000, 0.95
_EXPONENTS = (1e-3, 8.0)
_GRID, _ROUNDS = 25, 11
"""Each round is six times as fine as the one before: the exponent is found to a part in 10^8."""
Floats = npt.NDArray[np.float64]


class TooFewPoints(ValueError):
    """Points that determine no power law; the message says what is missing."""


@dataclass(frozen=True)
class Interval:
    """A fitted number with the bounds that hold 95 % of the resamples."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}g} ({self.low:.{digits}g} to {self.high:.{digits}g})"


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A fit. `irreducible` is E, `scale` is A x_0^-a, the loss above E at x_0, the geometric mean of the xs, `exponent` a."""

    irreducible: Interval
    scale: Interval
    exponent: Interval
    x_0: float
    xs: Floats
    losses: Floats
    residual: float
    """Root mean square of loss minus fit."""
    _samples: Floats
    """[resamples, 3]: E, A x_0^-a and a."""

    def at(self, xs: Sequence[float] | Floats) -> tuple[Floats, Floats, Floats]:
        """The fitted losses at `xs`, and the lower and upper bound of each."""
        x = np.asarray(xs, float) / self.x_0
        best = self.irreducible.value + self.scale.value * x**-self.exponent.value
        curves = self._samples[:, :1] + self._samples[:, 1:2] * x ** -self._samples[:, 2:]
        low, high = np.quantile(curves, _tails(), axis=0)
        return best, np.minimum(low, best), np.maximum(high, best)

    @property
    def doubts(self) -> list[str]:
        """What the points do not determine."""
        found = []
        if self.irreducible.low < 0.01 * self.losses.min():
            found.append("the points do not show where the loss ends: the interval of E begins at 0")
        if self.exponent.high > 3 * max(self.exponent.low, _EXPONENTS[0]):
            found.append(
                "the exponent is known to no better than a factor of 3: more points, or a wider range of them"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "E": vars(self.irreducible),
            "scale": vars(self.scale),
            "x_0": self.x_0,
            "exponent": vars(self.exponent),
            "residual": self.residual,
            "points": len(self.xs),
            "doubts": self.doubts,
        }


def fit_power_law(xs: Sequence[float], losses: Sequence[float], *, seed: int = 0) -> PowerLaw:
    """Fit losses (nats per token, several runs at one x are several points) over x (FLOP, tokens or parameters).

    Raises TooFewPoints below `LEAST_POINTS` different xs, ValueError for numbers that are not finite or not above 0.
    `seed`: of the resamples; the same numbers give the same fit.
    """
    x, y = np.asarray(xs, float), np.asarray(losses, float)
    if x.shape != y.shape or not (
        np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()
    ):
        raise ValueError("a power law needs as many finite losses above 0 as finite xs above 0")
    different = len(np.unique(x))
    if different < LEAST_POINTS:
        raise TooFewPoints(
            f"{different} different {'point' if different == 1 else 'points'}, and a power law with an irreducible part "
            f"has three numbers to find: at least {LEAST_POINTS} are needed"
        )
    x_0 = float(np.exp(np.log(x).mean()))
    best = _solve(x / x_0, y[None])[0]
    fitted = _values(best[None], x / x_0)[0]
    residuals = y - fitted
    spread = np.sqrt(len(y) / (len(y) - 3)) * (residuals - residuals.mean())
    drawn = np.random.default_rng(seed).choice(spread, (_RESAMPLES, len(y)))
    samples = _solve(x / x_0, fitted + drawn)
    low, high = np.quantile(samples, _tails(), axis=0)
    irreducible, scale, exponent = (
        Interval(float(value), float(min(a, value)), float(max(b, value)))
        for value, a, b in zip(best, low, high, strict=True)
    )
    residual = float(np.sqrt((residuals**2).mean()))
    return PowerLaw(irreducible, scale, exponent, x_0, x, y, residual, samples)


def _tails() -> tuple[float, float]:
    return (1 - _LEVEL) / 2, (1 + _LEVEL) / 2


def _values(parameters: Floats, x: Floats) -> Floats:
    return parameters[:, :1] + parameters[:, 1:2] * x ** -parameters[:, 2:]


def _solve(x: Floats, losses: Floats) -> Floats:
    """x [n], losses [b, n] -> E, A, a of the least squares of each row, [b, 3].

    The exponent is searched on a grid of its logarithm that is drawn closer around the best one, round by round.
    """
    low = np.full(len(losses), np.log(_EXPONENTS[0]))
    high = np.full(len(losses), np.log(_EXPONENTS[1]))
    for _ in range(_ROUNDS):
        grid = np.linspace(low, high, _GRID, axis=1)
        errors, _, _ = _linear(x, losses, np.exp(grid))
        at = errors.argmin(axis=1)
        rows, step = np.arange(len(losses)), (high - low) / (_GRID - 1)
        centre = grid[rows, at]
        low = np.maximum(centre - 2 * step, np.log(_EXPONENTS[0]))
        high = np.minimum(centre + 2 * step, np.log(_EXPONENTS[1]))
    exponent = np.exp(centre)
    _, irreducible, scale = _linear(x, losses, exponent[:, None])
    return np.stack([irreducible[:, 0], scale[:, 0], exponent], axis=1)


def _linear(x: Floats, losses: Floats, exponents: Floats) -> tuple[Floats, Floats, Floats]:
    """Least squares in E >= 0 and A >= 0 for exponents [b, g]: squared errors, E and A, each [b, g]."""
    u = x[None, None] ** -exponents[..., None]  # [b, g, n]
    y = losses[:, None]
    u_mean, y_mean = u.mean(-1), y.mean(-1)
    variance = ((u - u_mean[..., None]) ** 2).mean(-1)
    scale = ((u - u_mean[..., None]) * (y - y_mean[..., None])).mean(-1) / np.maximum(variance, 1e-300)
    scale = np.maximum(scale, 0.0)
    irreducible = y_mean - scale * u_mean
    through_zero = (u * y).mean(-1) / (u * u).mean(-1)  # the best A where E would be negative
    scale = np.where(irreducible < 0, through_zero, scale)
    irreducible = np.maximum(irreducible, 0.0)
    errors = ((y - irreducible[..., None] - scale[..., None] * u) ** 2).sum(-1)
    return errors, irreducible, scale
