"""What a configuration says about the noise of each stack: intervals, point masks, time steps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from stackwise.config.errors import ConfigError
from stackwise.config.root import StackWiseConfig
from stackwise.objectives.depth import MaskScheduler, stack_noise


def config_of(objective: dict[str, Any] | None = None, **keys: Any) -> StackWiseConfig:
    """Without the rules that join keys, so that what is under test finds the problem itself."""
    config = StackWiseConfig()
    for name, value in keys.items():
        setattr(config.training.progressive, name, value)
    for name, value in (objective or {}).items():
        setattr(config.objective, name, value)
    return config


def left_to_right(n: int, **keys: Any) -> list[float]:
    noise = stack_noise(config_of(building_mode="prepend", **keys), n)
    assert noise.points is not None
    assert all(noise.trains_on(d) == (share, share) for d, share in enumerate(noise.points))
    return list(reversed(noise.points))


@pytest.mark.parametrize(
    ("n", "kind", "expected"),
    [
        (4, "linear", [0.90, 0.65, 0.40, 0.15]),
        (6, "linear", [0.90, 0.75, 0.60, 0.45, 0.30, 0.15]),
        (6, "cosine", [0.90, 0.828, 0.641, 0.409, 0.222, 0.15]),
        (6, "exponential", [0.90, 0.685, 0.509, 0.365, 0.247, 0.15]),
        (1, "linear", [0.15]),
    ],
)
def test_scheduled_point_masks(n: int, kind: str, expected: list[float]) -> None:
    objective = {"mask_schedule_type": kind}
    shares = left_to_right(n, objective=objective, time_step_mask_fractions="schedule")
    assert shares == pytest.approx(expected, abs=5e-4)


def test_listed_point_masks_are_spread_over_the_stacks() -> None:
    fractions = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert left_to_right(5, time_step_mask_fractions=fractions) == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert left_to_right(3, time_step_mask_fractions=fractions) == [0.5, 0.3, 0.1]
    assert left_to_right(4, time_step_mask_fractions=[0.2, 0.8]) == [0.8, 0.8, 0.2, 0.2]
    assert left_to_right(1, time_step_mask_fractions=fractions) == [0.1]


def test_point_masks_by_step_are_interpolated_and_level_outside() -> None:
    config = config_of(time_step_mask_fractions={300: 0.8, 100: 0.4}, building_mode="prepend")
    noise = stack_noise(config, 5)
    assert noise.points == pytest.approx((0.4, 0.4, 0.6, 0.8, 0.8))
    assert [noise.share_at(k) for k in (0, 150, 299, 499)] == pytest.approx([0.4, 0.5, 0.798, 0.8])


@pytest.mark.parametrize(
    ("mode", "distances"),
    [
        ("prepend", [0, 1, 2, 3]),
        ("independent", [0, 1, 2, 3]),
        ("append", [3, 2, 1, 0]),
        ("cyclic", [3, 2, 1, 0]),
    ],
)
def test_distance_from_the_head_follows_the_order_of_building(mode: str, distances: list[int]) -> None:
    noise = stack_noise(config_of(building_mode=mode), 4)
    assert [noise.distance(b) for b in range(4)] == distances
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match="among 4 stacks"):
            noise.distance(wrong)


def test_steps_run_through_the_intervals_of_their_owners() -> None:
    config = config_of(stack_time_mapping="custom", time_boundaries=[0.0, 0.2, 1.0], time_per_stack=4)
    noise = stack_noise(config, 2)
    assert noise.starts == (0, 4, 8)
    shares = [noise.share_at(k) for k in range(8)]
    assert shares == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.4, 0.6, 0.8, 1.0])
    for outside in (-1, 8):
        with pytest.raises(ValueError, match="0 to 7"):
            noise.share_at(outside)


@pytest.mark.parametrize("mode", ["prepend", "append"])
def test_a_map_is_asked_for_build_indices(mode: str) -> None:
    config = config_of(building_mode=mode)
    by_distance = [0, 30, 100]

    def first_step(stack: int, stacks: int, steps: int) -> int:
        assert (stacks, steps) == (3, 300)
        return by_distance[stack if mode == "prepend" else 2 - stack]

    noise = stack_noise(config, 3, first_step)
    assert noise.starts == (0, 30, 100, 300)
    assert noise.intervals is not None
    assert noise.intervals.boundaries == pytest.approx((0, 0.1, 1 / 3, 1))
    assert noise.share_at(29) == pytest.approx(0.1)


def test_training_intervals_are_widened_by_the_overlap() -> None:
    noise = stack_noise(config_of(time_overlap=0.1), 4)
    assert [noise.trains_on(d) for d in range(4)] == [
        pytest.approx(pair) for pair in ((0, 0.275), (0.225, 0.525), (0.475, 0.775), (0.725, 1))
    ]


def test_the_first_exponential_boundary_is_the_smallest_mask_fraction() -> None:
    config = config_of({"min_mask_fraction": 0.3}, stack_time_mapping="exponential")
    intervals = stack_noise(config, 3).intervals
    assert intervals is not None
    assert intervals.boundaries == pytest.approx((0, 0.3, 0.3**0.5, 1))


@pytest.mark.parametrize(
    ("keys", "mapping", "key", "words"),
    [
        ({"num_time_steps": 500}, None, "num_time_steps", "make 300"),
        ({"stack_time_mapping": "custom"}, None, "stack_time_mapping", "time_mapping"),
        (
            {"stack_time_mapping": "custom", "time_boundaries": [0.0, 1.0]},
            None,
            "time_boundaries",
            "3 stacks",
        ),
        ({"time_step_mask_fractions": [0.5, 0.2]}, None, "time_step_mask_fractions", "lightest first"),
        ({"time_step_mask_fractions": {0: 0.5, 9: 0.2}}, None, "time_step_mask_fractions", "lightest first"),
        ({"time_step_mask_fractions": []}, None, "time_step_mask_fractions", "at least one"),
        ({"time_step_mask_fractions": "schedule"}, lambda b, n, h: b, "time_step_mask_fractions", "drop one"),
        ({"time_boundaries": [0.0, 1.0]}, lambda b, n, h: b, "stack_time_mapping", "given twice"),
        ({"building_mode": "append"}, lambda b, n, h: b * 100, "stack_time_mapping", "gap"),
        ({"building_mode": "prepend"}, lambda b, n, h: min(b, 1), "stack_time_mapping", "not monotone"),
    ],
)
def test_what_leaves_noise_without_one_owner_is_refused(
    keys: dict, mapping: Any, key: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        stack_noise(config_of(**keys), 3, mapping)
    assert caught.value.problems[0].key == f"training.progressive.{key}"


def test_wrong_mask_schedulers_are_named() -> None:
    with pytest.raises(ConfigError, match=r"mask_schedule_type.*linear, cosine, exponential"):
        MaskScheduler("power")
    with pytest.raises(ConfigError, match="min <= max"):
        MaskScheduler("linear", 0.9, 0.1)
    with pytest.raises(ValueError, match="outside"):
        MaskScheduler().ratio(-0.1)


def test_work_on_intervals_does_not_import_torch() -> None:
    program = "import sys, stackwise.objectives.depth as d; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
