"""Intervals of noise: they cover all of it, once."""

from __future__ import annotations

import random

import pytest

from stackwise.config.errors import ConfigError
from stackwise.objectives.intervals import Intervals


def some_intervals() -> list[Intervals]:
    cuts = sorted(random.random() for _ in range(4))
    return [
        Intervals.linear(1),
        Intervals.linear(3),
        Intervals.linear(7),
        Intervals.exponential(1, 0.15),
        Intervals.exponential(5, 0.15),
        Intervals.custom(5, [0.0, *cuts, 1.0]),
        Intervals.custom(4, lambda d, n, steps: d * d * steps // (n * n), 400),
    ]


def test_linear_boundaries_are_equal_and_exponential_ones_grow_by_one_factor() -> None:
    assert Intervals.linear(4).boundaries == (0, 0.25, 0.5, 0.75, 1)
    assert Intervals.exponential(4, 0.15).boundaries == pytest.approx((0, 0.15, 0.282, 0.531, 1), abs=5e-4)
    assert Intervals.exponential(1, 0.15).boundaries == (0, 1)


@pytest.mark.parametrize("total", [1, 2, 9, 32, 63])
def test_every_count_of_masked_tokens_has_one_owner(total: int) -> None:
    for intervals in some_intervals():
        owned = [list(intervals.counts(d, total)) for d in range(intervals.count)]
        assert [n for counts in owned for n in counts] == list(range(1, total + 1))
        for d, counts in enumerate(owned):
            assert all(intervals.owner(n / total) == d for n in counts)
            lo, hi = intervals.of(d)
            assert all(lo < n / total <= hi for n in counts)


def test_a_seam_belongs_to_the_lighter_side() -> None:
    intervals = Intervals.linear(3)
    assert [intervals.owner(n / 9) for n in range(1, 10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert intervals.owner(1e-12) == 0


def test_widening_adds_to_both_sides_but_never_leaves_the_unit_interval() -> None:
    intervals = Intervals((0.0, 0.2, 0.6, 1.0))
    assert intervals.widened(0, 0.1) == pytest.approx((0, 0.22))
    assert intervals.widened(1, 0.1) == pytest.approx((0.16, 0.64))
    assert intervals.widened(2, 0.1) == pytest.approx((0.56, 1.0))
    assert intervals.widened(1, 0.0) == intervals.of(1)
    with pytest.raises(ConfigError, match="time_overlap"):
        intervals.widened(1, 0.5)


def test_steps_are_equal_shares_of_the_horizon() -> None:
    assert [Intervals.linear(4).steps(d, 100) for d in (0, 3)] == [range(100), range(300, 400)]


def test_a_custom_map_gives_first_steps() -> None:
    seen = []

    def starts(stack: int, stacks: int, steps: int) -> int:
        seen.append((stack, stacks, steps))
        return [0, 50, 120][stack]

    assert Intervals.custom(3, starts, 200).boundaries == (0, 0.25, 0.6, 1)
    assert seen == [(0, 3, 200), (1, 3, 200), (2, 3, 200)]


@pytest.mark.parametrize(
    ("boundaries", "words"),
    [
        ([0.0, 0.5, 0.5, 1.0], "not monotone at number 3"),
        ([0.0, 0.7, 0.4, 1.0], "not monotone at number 3"),
        ([0.1, 0.4, 0.6, 1.0], "a gap"),
        ([0.0, 0.4, 0.6, 0.9], "a gap"),
        ([0.0, 0.4, 1.0], "3 boundaries for 3 stacks"),
        (None, "time_mapping"),
        (lambda d, n, steps: (n - d) * 10, "a gap"),
        (lambda d, n, steps: [0, 60, 60][d], "not monotone"),
        (lambda d, n, steps: [0, 60, 40][d], "not monotone"),
        (lambda d, n, steps: [0, 60, 10**6][d], "not monotone"),  # clamped to the horizon it owns nothing
        (lambda d, n, steps: [5, 60, 70][d], "a gap"),
    ],
)
def test_gaps_and_maps_that_do_not_rise_are_refused(boundaries: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Intervals.custom(3, boundaries, 300)  # type: ignore[arg-type]


def test_no_stack_and_no_share_outside() -> None:
    intervals = Intervals.linear(3)
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match="has 3 stacks"):
            intervals.of(wrong)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
            intervals.owner(share)
    with pytest.raises(ConfigError, match="min_mask_fraction"):
        Intervals.exponential(3, 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        Intervals.linear(0)
