"""Noise schedules: ends, order, slope, weight and inverse, for every kind."""

from __future__ import annotations

import math

import pytest
import torch

from stackwise.config.errors import ConfigError
from stackwise.objectives.schedules import NoiseSchedule

TABLE = [0.0, 0.1, 0.15, 0.6, 1.0]
BOUNDS = [(0.0, 1.0), (0.15, 0.9)]
SHAPES: list[dict] = [
    {"kind": "linear"},
    {"kind": "cosine"},
    {"kind": "exponential"},
    {"kind": "power", "power": 2.5},
    {"kind": "power", "power": 0.5},
    {"kind": "table", "table": TABLE},
]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape['kind']}{shape.get('power', '')}")
def shape(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.fixture(params=BOUNDS, ids=str)
def schedule(request: pytest.FixtureRequest, shape: dict) -> NoiseSchedule:
    low, high = request.param
    return NoiseSchedule(**shape, low=low, high=high)


def test_rates_run_from_bound_to_bound_and_rise(schedule: NoiseSchedule) -> None:
    assert schedule.rate(0.0) == pytest.approx(schedule.low, abs=1e-15)
    assert schedule.rate(1.0) == pytest.approx(schedule.high, abs=1e-15)
    rates = schedule.rate(torch.linspace(0, 1, 1001))
    assert bool((rates.diff() > 0).all())
    assert torch.allclose(schedule.alpha(torch.linspace(0, 1, 1001)), 1 - rates, atol=1e-15)


def test_slope_and_weight_are_the_numeric_derivatives(schedule: NoiseSchedule) -> None:
    t = torch.rand(200, dtype=torch.float64) * 0.98 + 0.01
    if schedule.kind == "table":  # at its kinks there are two slopes
        t = t[((t * 4) - (t * 4).round()).abs() > 1e-3]
    h = 1e-6
    slope = (schedule.rate(t + h) - schedule.rate(t - h)) / (2 * h)
    log_slope = (schedule.rate(t + h).log() - schedule.rate(t - h).log()) / (2 * h)
    assert torch.allclose(schedule.derivative(t), slope, rtol=1e-6)
    assert torch.allclose(schedule.weight(t), log_slope, rtol=1e-5)


def test_the_inverse_gives_back_the_time(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    assert torch.allclose(schedule.inverse(schedule.alpha(t)), t, atol=1e-6)  # flat ends lose digits
    assert schedule.inverse(schedule.alpha(0.3)) == pytest.approx(0.3)


def test_the_formulas() -> None:
    t = 0.37
    assert NoiseSchedule("linear").rate(t) == t
    assert NoiseSchedule("linear").weight(t) == pytest.approx(1 / t)
    assert NoiseSchedule("cosine").rate(t) == pytest.approx(1 - math.cos(math.pi * t / 2))
    assert NoiseSchedule("exponential").rate(t) == pytest.approx((math.exp(t) - 1) / (math.e - 1))
    assert NoiseSchedule("power", power=3).rate(t) == pytest.approx(t**3)
    assert NoiseSchedule("table", table=TABLE).rate(0.375) == pytest.approx(0.125)
    assert NoiseSchedule("linear", low=0.2, high=0.6).rate(0.5) == pytest.approx(0.4)


def test_floats_give_floats_and_tensors_float64_of_their_shape(schedule: NoiseSchedule) -> None:
    t = torch.rand(3, 4) * 0.9 + 0.05
    for method in ("rate", "alpha", "derivative", "weight"):
        whole = getattr(schedule, method)(t)
        assert whole.dtype == torch.float64
        assert whole.shape == t.shape
        one = getattr(schedule, method)(float(t[1, 2]))
        assert isinstance(one, float)
        assert one == pytest.approx(float(whole[1, 2]))


def test_small_times_lose_no_digits() -> None:
    assert NoiseSchedule("cosine").weight(1e-7) == pytest.approx(2e7, rel=1e-9)
    assert NoiseSchedule("exponential").weight(1e-9) == pytest.approx(1e9, rel=1e-6)


def test_the_sampling_grid_falls_from_all_noise_to_none() -> None:
    grid = NoiseSchedule("cosine").sampling_grid(4)
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="at least 1"):
        NoiseSchedule().sampling_grid(0)


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        (
            {"kind": "cosin"},
            "objective.noise_schedule",
            "linear, cosine, exponential, power, table; did you mean",
        ),
        ({"kind": "power", "power": 0.0}, "objective.noise_power", "> 0"),
        ({"kind": "table"}, "objective.noise_table", "needed by"),
        ({"kind": "table", "table": [0, 0.5, 0.5, 1]}, "objective.noise_table", "rise"),
        ({"kind": "table", "table": [0.1, 1]}, "objective.noise_table", "from 0 to 1"),
        ({"kind": "table", "table": [0]}, "objective.noise_table", "two or more"),
        ({"low": 0.5, "high": 0.5}, "", "low < high"),
    ],
)
def test_wrong_schedules_are_named(arguments: dict, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NoiseSchedule(**arguments)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert words in str(caught.value)


def test_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        NoiseSchedule().rate(1.5)
    with pytest.raises(ValueError, match=r"runs from 0\.1 to 1"):
        NoiseSchedule(high=0.9).inverse(0.05)
