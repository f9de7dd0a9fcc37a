"""Depth as time: which share of the noise each stack owns.

A stack is named by its distance from the head, d = 0 next to it. The stack at d owns the masked shares
(r_d, r_{d+1}] of the boundaries 0 = r_0 < … < r_N = 1: light noise at the head, heavy noise at the input.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stackwise.config.errors import ConfigError, Problem

BOUNDARIES = "training.progressive.time_boundaries"
MAPPING = "training.progressive.stack_time_mapping"

StackMap = Callable[[int, int, int], int]
"""(stack, number of stacks, number of time steps) -> the first time step the stack owns."""


@dataclass(frozen=True)
class Intervals:
    """Disjoint intervals of masked shares that cover (0, 1], one per stack.

    `boundaries` are N + 1 numbers from 0 to 1. Raises: ConfigError when they do not rise, or leave a gap at either end.
    """

    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        b = self.boundaries
        allowed = "mask shares that rise from 0 to 1, one more than there are stacks"
        if len(b) < 2:
            raise ConfigError(Problem(BOUNDARIES, "no interval", list(b), allowed))
        problems = [
            Problem(BOUNDARIES, f"not monotone at number {i + 1}", list(b), allowed)
            for i in range(1, len(b))
            if not b[i - 1] < b[i]
        ]
        if b[0] != 0 or b[-1] != 1:
            problems.append(Problem(BOUNDARIES, "a gap: not from 0 to 1", list(b), allowed))
        if problems:
            raise ConfigError(problems)

    @classmethod
    def linear(cls, n: int) -> Intervals:
        """n intervals of equal width: equal decrements of the kept share."""
        return cls(tuple(b / _positive(n) for b in range(n + 1)))

    @classmethod
    def exponential(cls, n: int, first: float) -> Intervals:
        """n intervals with r_b = first^((n - b)/(n - 1)) for b >= 1: each is wider than the last by one factor.

        `first`, in (0, 1), is the upper end of the interval next to the head; with n = 1 that is 1.
        """
        if not 0 < first < 1:
            raise ConfigError(
                Problem("objective.min_mask_fraction", "no first exponential boundary", first, "> 0 and < 1")
            )
        inner = (first ** ((n - b) / (n - 1)) for b in range(1, n))
        return cls((0.0, *inner, 1.0)) if _positive(n) > 1 else cls((0.0, 1.0))

    @classmethod
    def custom(
        cls, n: int, given: Sequence[float] | StackMap | None, num_time_steps: int | None = None
    ) -> Intervals:
        """n intervals from n + 1 boundaries, or from a map (d, n, num_time_steps) -> first step owned.

        Steps are clamped to the horizon; a step's share of the horizon is the boundary, and the last boundary is 1.
        Raises: ConfigError for none, another number of boundaries, a gap, or a map that does not rise with d.
        """
        if given is None:
            way = "set time_boundaries, or pass a map to TimeStepMasking(time_mapping=…)"
            raise ConfigError(Problem(MAPPING, "custom without boundaries", "custom", hint=way))
        if callable(given):
            horizon = _positive(num_time_steps or 0)
            starts = first_steps(n, given, horizon)
            if starts[0] != 0:
                text = f"a gap: the stack next to the head begins at step {starts[0]}, and none owns those before"
                raise ConfigError(Problem(MAPPING, text, starts, "first steps that rise from 0"))
            if any(b <= a for a, b in zip(starts, [*starts[1:], horizon], strict=True)):
                text = f"the map is not monotone within {horizon} steps"
                raise ConfigError(
                    Problem(MAPPING, text, starts, "first steps that rise from head to embedding")
                )
            return cls((*(step / horizon for step in starts), 1.0))
        if len(given) != n + 1:
            text = f"{len(given)} boundaries for {n} stacks"
            raise ConfigError(Problem(BOUNDARIES, text, list(given), f"{n + 1} mask shares from 0 to 1"))
        return cls(tuple(float(b) for b in given))

    @property
    def count(self) -> int:
        """Number of stacks."""
        return len(self.boundaries) - 1

    def of(self, distance: int) -> tuple[float, float]:
        """(lo, hi): the stack at this distance from the head owns the shares lo < r <= hi."""
        d = self._checked(distance)
        return self.boundaries[d], self.boundaries[d + 1]

    def widened(self, distance: int, overlap: float) -> tuple[float, float]:
        """(lo, hi) a stack trains on: its interval and `overlap` of its width on both sides, inside (0, 1]."""
        if not 0 <= overlap < 0.5:
            raise ConfigError(
                Problem("training.progressive.time_overlap", "out of range", overlap, ">= 0 and < 0.5")
            )
        lo, hi = self.of(distance)
        more = overlap * (hi - lo)
        return max(0.0, lo - more), min(1.0, hi + more)

    def owner(self, share: float) -> int:
        """The distance d with r_d < share <= r_{d+1}. Raises: ValueError outside (0, 1]."""
        if not 0 < share <= 1:
            raise ValueError(
                f"the masked share is {share}, outside (0, 1]; where nothing is masked no stack is asked"
            )
        return bisect_left(self.boundaries, share) - 1

    def counts(self, distance: int, total: int) -> range:
        """The numbers n of masked tokens, of `total`, whose share n/total the stack owns; may be empty."""
        below = [bisect_right(range(1, total + 1), b, key=lambda n: n / total) for b in self.of(distance)]
        return range(below[0] + 1, below[1] + 1)

    def steps(self, distance: int, per_stack: int) -> range:
        """The time steps of the stack: d · per_stack up to, not including, (d + 1) · per_stack."""
        d = self._checked(distance)
        return range(d * per_stack, (d + 1) * per_stack)

    def _checked(self, distance: int) -> int:
        if not 0 <= distance < self.count:
            raise IndexError(
                f"distance {distance} is outside 0 to {self.count - 1}: the mapping has {self.count} stacks"
            )
        return distance


def first_steps(n: int, mapping: StackMap, num_time_steps: int) -> list[int]:
    """First step of each stack by `mapping`, by distance, clamped to 0 … num_time_steps."""
    return [min(max(int(mapping(d, n, num_time_steps)), 0), num_time_steps) for d in range(n)]


def _positive(n: int) -> int:
    if n < 1:
        raise ValueError(f"{n} stacks or steps; at least 1 is needed")
    return n
