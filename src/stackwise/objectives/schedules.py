"""How much noise at which time: the masked share r(t), and everything that follows from it.

t in [0, 1], r the share of masked tokens, alpha = 1 - r the share that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from stackwise.config.errors import ConfigError, Problem, did_you_mean

KINDS = ("linear", "cosine", "exponential", "power", "table")

Times = TypeVar("Times", float, Tensor)


class NoiseSchedule:
    """r(t) = low + (high - low) s(t), where s rises from 0 to 1:

    linear t; cosine 1 - cos(πt/2); exponential (e^t - 1)/(e - 1); power t^power; table: the straight lines through
    the numbers of `table`, evenly spaced in t.

    Methods take a float, or a float tensor of any shape and give a float64 one. A float outside [0, 1] is a ValueError;
    tensors are trusted, for a check would wait for their device.
    Raises: ConfigError for an unknown kind, a power that is not positive, a table that does not rise from 0 to 1, bounds
    that are not 0 <= low < high <= 1.
    """

    def __init__(
        self,
        kind: str = "linear",
        power: float = 1.0,
        table: Sequence[float] | None = None,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        problems = []
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS)
            problems.append(
                Problem("objective.noise_schedule", "unknown schedule", kind, ", ".join(KINDS), hint)
            )
        if not power > 0:
            problems.append(Problem("objective.noise_power", "not a power", power, "> 0"))
        if kind == "table":
            problems += _table_problems(table)
        if not 0 <= low < high <= 1:
            problems.append(
                Problem("", "not bounds of the masked share", [low, high], "0 <= low < high <= 1")
            )
        if problems:
            raise ConfigError(problems)
        self.kind, self.low, self.high = kind, low, high
        self._shape = _shape(kind, power, table)

    def rate(self, t: Times) -> Times:
        """The masked share r at time t."""
        return self._map(t, lambda x: self.low + (self.high - self.low) * self._shape.value(x))

    def alpha(self, t: Times) -> Times:
        """The kept share 1 - r at time t."""
        return self._map(t, lambda x: 1 - self.low - (self.high - self.low) * self._shape.value(x))

    def derivative(self, t: Times) -> Times:
        """r'(t). At a kink of a table, that to the right."""
        return self._map(t, lambda x: (self.high - self.low) * self._shape.slope(x))

    def weight(self, t: Times) -> Times:
        """w(t) = -alpha'/(1 - alpha) = r'/r, of the bound of masked diffusion (Sahoo et al. 2024); 1/t if linear.

        Infinite where r is 0.
        """
        return self._map(
            t,
            lambda x: (
                (self.high - self.low)
                * self._shape.slope(x)
                / (self.low + (self.high - self.low) * self._shape.value(x))
            ),
        )

    def inverse(self, alpha: Times) -> Times:
        """The time t at which alpha(t) is `alpha`. A float out of reach, outside [1 - high, 1 - low], is a ValueError."""
        if not isinstance(alpha, Tensor) and not 1 - self.high <= alpha <= 1 - self.low:
            raise ValueError(
                f"alpha is {alpha}; this schedule runs from {1 - self.high:.6g} to {1 - self.low:.6g}"
            )
        return self._map(
            alpha,
            lambda x: self._shape.inverse(((1 - x - self.low) / (self.high - self.low)).clamp(0, 1)),
        )

    def sampling_grid(self, k: int) -> Tensor:
        """The times of k sampling steps, float64 [k + 1], evenly from 1 down to 0; step i goes from t_i to t_{i+1}."""
        if k < 1:
            raise ValueError(f"k is {k}, but sampling takes at least 1 step")
        return torch.linspace(1, 0, k + 1, dtype=torch.float64)

    def _map(self, t: Times, function: Callable[[Tensor], Tensor]) -> Times:
        if isinstance(t, Tensor):
            return function(t.double())
        if not 0 <= t <= 1:
            raise ValueError(f"{t} is outside [0, 1]")
        return function(torch.tensor(t, dtype=torch.float64)).item()


class _Shape:
    """A function from [0, 1] onto [0, 1] with its slope and inverse."""

    def __init__(
        self,
        value: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor],
    ) -> None:
        self.value, self.slope, self.inverse = value, slope, inverse


def _shape(kind: str, power: float, table: Sequence[float] | None) -> _Shape:
    if kind == "linear":
        return _Shape(lambda t: t, torch.ones_like, lambda s: s)
    if kind == "cosine":
        half = math.pi / 2
        # 1 - cos x = 2 sin² (x/2) does not cancel near 0, where the weight divides by it.
        return _Shape(
            lambda t: 2 * torch.sin(half * t / 2) ** 2,
            lambda t: half * torch.sin(half * t),
            lambda s: 2 * torch.asin(torch.sqrt(s / 2)) / half,
        )
    if kind == "exponential":
        top = math.expm1(1)
        return _Shape(
            lambda t: torch.expm1(t) / top,
            lambda t: torch.exp(t) / top,
            lambda s: torch.log1p(s * top),
        )
    if kind == "power":
        return _Shape(lambda t: t**power, lambda t: power * t ** (power - 1), lambda s: s ** (1 / power))
    assert table is not None  # checked by the constructor
    heights = torch.tensor(table, dtype=torch.float64)
    cells = len(heights) - 1
    knots = torch.arange(cells + 1, dtype=torch.float64) / cells

    def lines(x: Tensor, at: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        at, to = at.to(x.device), to.to(x.device)
        i = (torch.searchsorted(at, x.contiguous(), right=True) - 1).clamp(0, cells - 1)
        slope = (to[i + 1] - to[i]) / (at[i + 1] - at[i])
        return to[i] + slope * (x - at[i]), slope

    return _Shape(
        lambda t: lines(t, knots, heights)[0],
        lambda t: lines(t, knots, heights)[1],
        lambda s: lines(s, heights, knots)[0],
    )


def _table_problems(table: Sequence[float] | None) -> list[Problem]:
    key, allowed = "objective.noise_table", "two or more numbers that rise from 0 to 1"
    if table is None:
        return [Problem(key, "needed by the schedule `table`", table, allowed)]
    rising = all(a < b for a, b in pairwise(table))
    if len(table) < 2 or table[0] != 0 or table[-1] != 1 or not rising:
        return [Problem(key, "no rising table", list(table), allowed)]
    return []
