"""Depth as time, from the keys of a configuration: the noise and the time steps of every stack. No torch here.

Stacks are named by their distance d from the head, as in `intervals`. P is `time_per_stack`, N the number of stacks the
run ends with; the steps of all stacks make up the horizon.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from stackwise.config.errors import ConfigError, Problem, did_you_mean
from stackwise.objectives.intervals import MAPPING, Intervals, StackMap, first_steps

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

KINDS = ("linear", "cosine", "exponential")
POINTS = "training.progressive.time_step_mask_fractions"
HORIZON = "training.progressive.num_time_steps"


class MaskScheduler:
    """The mask share of a stack by its place: low + (high - low) s(u), u = 0 next to the head, 1 next to the embedding.

    s is u (linear), (1 - cos πu)/2 (cosine) or (e^u - 1)/(e - 1) (exponential).
    Raises: ConfigError for an unknown kind, or bounds that are not 0 <= low <= high <= 1.
    """

    def __init__(self, kind: str = "linear", low: float = 0.0, high: float = 1.0) -> None:
        problems = []
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS)
            key = "objective.mask_schedule_type"
            problems.append(Problem(key, "unknown schedule", kind, ", ".join(KINDS), hint))
        if not 0 <= low <= high <= 1:
            text = "with objective.max_mask_fraction no range of mask shares"
            problems.append(Problem("objective.min_mask_fraction", text, [low, high], "0 <= min <= max <= 1"))
        if problems:
            raise ConfigError(problems)
        self.kind, self.low, self.high = kind, low, high

    def ratio(self, u: float) -> float:
        """The mask share at u. Raises: ValueError outside [0, 1]."""
        if not 0 <= u <= 1:
            raise ValueError(f"u is {u}, outside [0, 1]")
        if self.kind == "cosine":
            s = (1 - math.cos(math.pi * u)) / 2
        else:
            s = u if self.kind == "linear" else math.expm1(u) / math.expm1(1)
        return self.low + (self.high - self.low) * s


@dataclass(frozen=True)
class StackNoise:
    """The noise of each stack: an interval of masked shares, or one share (`points`), lightest first.

    `starts` are the first time steps of the stacks and the horizon. `left_is_newest`: stacks are built from the head
    to the embedding, so that build index and distance are one.
    """

    starts: tuple[int, ...]
    left_is_newest: bool
    overlap: float
    intervals: Intervals | None = None
    points: tuple[float, ...] | None = None
    by_step: tuple[tuple[int, float], ...] | None = None

    @property
    def count(self) -> int:
        """Number of stacks."""
        return len(self.starts) - 1

    def distance(self, build_index: int) -> int:
        """Distance from the head of the stack built as number `build_index`, from 0. IndexError beyond the last."""
        if not 0 <= build_index < self.count:
            raise IndexError(
                f"stack {build_index} is outside 0 to {self.count - 1}: time is shared out among {self.count} stacks"
                " (training.progressive.target_stacks)"
            )
        return build_index if self.left_is_newest else self.count - 1 - build_index

    def trains_on(self, distance: int) -> tuple[float, float]:
        """(lo, hi) of the masked shares a stack is trained on: its interval widened by the overlap, or one share twice."""
        if self.intervals is not None:
            return self.intervals.widened(distance, self.overlap)
        assert self.points is not None
        return self.points[distance], self.points[distance]

    def owns(self, distance: int) -> tuple[float, float]:
        """(lo, hi) of the masked shares a stack answers for: its interval, or one share twice."""
        if self.intervals is not None:
            return self.intervals.of(distance)
        return self.trains_on(distance)

    @property
    def routes(self) -> Intervals:
        """Which stack is asked at which masked share: the owner, or the one whose point is nearest.

        Stacks with one and the same point divide what is near it evenly.
        """
        if self.intervals is not None:
            return self.intervals
        assert self.points is not None
        groups = [(share, len(list(same))) for share, same in groupby(self.points)]
        ends = [*((a + b) / 2 for (a, _), (b, _) in pairwise(groups)), 1.0]
        bounds = [0.0]
        for end, (_, count) in zip(ends, groups, strict=True):
            start = bounds[-1]
            bounds += [start + (end - start) * i / count for i in range(1, count)] + [end]
        return Intervals(tuple(bounds))

    def share_at(self, step: int) -> float:
        """The masked share at a time step: straight through the interval of its owner, or its owner's one share.

        The last step of an interval reaches its upper end. Raises: ValueError outside the horizon.
        """
        if not 0 <= step < self.starts[-1]:
            raise ValueError(
                f"time step {step} is outside 0 to {self.starts[-1] - 1}, the last of the horizon"
            )
        d = bisect_right(self.starts, step) - 1
        if self.intervals is not None:
            lo, hi = self.intervals.of(d)
            return lo + (hi - lo) * (step + 1 - self.starts[d]) / (self.starts[d + 1] - self.starts[d])
        if self.by_step is not None:
            return _between(self.by_step, step)
        assert self.points is not None
        return self.points[d]


def stack_noise(config: StackWiseConfig, n: int, mapping: StackMap | None = None) -> StackNoise:
    """What the configuration says about the noise of n stacks.

    `mapping` (build index, n, horizon) -> first time step stands in for `stack_time_mapping`.
    Raises: ConfigError for an impossible horizon, and for boundaries with a gap or out of order or descending point
    masks, both where both are wrong.
    """
    problems = list(_horizon_problems(config, n))
    try:
        noise = _noise(config, n, mapping)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return noise


def _horizon_problems(config: StackWiseConfig, n: int) -> Iterator[Problem]:
    keys = config.training.progressive
    horizon = n * keys.time_per_stack
    if keys.num_time_steps not in (None, horizon):
        hint = "leave it null, or set time_interpretation to input"
        text = f"{n} stacks of {keys.time_per_stack} time steps make {horizon}"
        yield Problem(HORIZON, text, keys.num_time_steps, str(horizon), hint)


def _noise(config: StackWiseConfig, n: int, mapping: StackMap | None) -> StackNoise:
    keys, low = config.training.progressive, config.objective.min_mask_fraction
    left = keys.building_mode in ("prepend", "independent")
    horizon = n * keys.time_per_stack
    starts = tuple(range(0, horizon + 1, keys.time_per_stack))
    given = keys.time_step_mask_fractions
    if given is not None:
        if mapping is not None:
            raise ConfigError(
                Problem(POINTS, "point masks leave nothing to map", given, hint="drop one of the two")
            )
        if given == "schedule":
            scheduler = MaskScheduler(
                config.objective.mask_schedule_type, low, config.objective.max_mask_fraction
            )
            points = [scheduler.ratio(_place(d, n)) for d in range(n)]
        elif isinstance(given, Mapping):
            by_step = tuple(sorted(given.items()))
            _check_rising([share for _, share in by_step], given)
            points = [_between(by_step, start) for start in starts[:-1]]
            return StackNoise(starts, left, keys.time_overlap, points=tuple(points), by_step=by_step)
        else:
            assert not isinstance(given, str)
            _check_rising(given, given)
            points = [given[round(_place(d, n) * (len(given) - 1))] for d in range(n)]
        return StackNoise(starts, left, keys.time_overlap, points=tuple(points))
    if mapping is not None:
        if keys.time_boundaries is not None:
            hint = "drop the map or training.progressive.time_boundaries"
            raise ConfigError(
                Problem(MAPPING, "given twice: by a map and by boundaries", "custom", hint=hint)
            )

        def by_distance(d: int, stacks: int, steps: int) -> int:
            return mapping(d if left else stacks - 1 - d, stacks, steps)

        intervals = Intervals.custom(n, by_distance, horizon)
        starts = (*first_steps(n, by_distance, horizon), horizon)
    elif keys.stack_time_mapping == "custom":
        intervals = Intervals.custom(n, keys.time_boundaries)
    elif keys.stack_time_mapping == "exponential":
        intervals = Intervals.exponential(n, low)
    else:
        intervals = Intervals.linear(n)
    return StackNoise(starts, left, keys.time_overlap, intervals)


def _place(distance: int, n: int) -> float:
    """0 next to the head, 1 next to the embedding; a single stack is next to the head."""
    return distance / (n - 1) if n > 1 else 0.0


def _check_rising(shares: Sequence[float], given: object) -> None:
    allowed = "at least one masked share, lightest first"
    if not shares:
        raise ConfigError(Problem(POINTS, "empty", given, allowed))
    if any(b < a for a, b in pairwise(shares)):
        raise ConfigError(Problem(POINTS, "not lightest first", given, allowed))


def _between(by_step: Sequence[tuple[int, float]], step: int) -> float:
    """Straight lines between the steps given, level beyond the first and the last."""
    after = bisect_right([at for at, _ in by_step], step)
    if after in (0, len(by_step)):
        return by_step[min(after, len(by_step) - 1)][1]
    (a, low), (b, high) = by_step[after - 1 : after + 1]
    return low + (high - low) * (step - a) / (b - a)
