"""The table of a 70B shape on one H200, and the rules behind it."""

from __future__ import annotations

import json

import pytest

from stackwise.config.errors import ConfigError
from stackwise.planning import rules
from stackwise.planning.devices import DEVICES, device_named
from stackwise.planning.shape import SHAPES, plan_shape

TABLE = [
    # frozen, trained, embedding and head, activations, adapters; all with buffers and what is reserved; fits
    ("append, nf4 trunk 76, 4 layers", (33.5, 54.8, 4.7, 6.1, 0.0), 106, "yes"),
    ("append, nf4 trunk 72, 8 layers", (31.8, 68.5, 3.1, 7.2, 0.0), 117, "yes"),
    ("append, bf16 trunk 76, 4 layers", (130.1, 54.8, 4.7, 6.1, 0.0), 202, "no"),
    ("prepend, nf4 suffix 76, 4 layers", (33.5, 54.8, 4.7, 26.5, 0.0), 126, "tight"),
    ("adapters r 8 on the trunk, 4 layers", (33.5, 54.8, 4.7, 26.5, 1.6), 128, "tight"),
    ("independent, 20 stacks of 4", (0.0, 54.8, 8.4, 6.1, 0.0), 76, "yes"),
    ("independent, 8 stacks of 10", (0.0, 85.6, 5.2, 7.7, 0.0), 105, "yes"),
    ("independent, 4 stacks of 20", (0.0, 102.7, 3.1, 10.4, 0.0), 123, "tight"),
    ("end to end", (0.0, 410.7, 3.1, 26.5, 0.0), 447, "no"),
]
DAYS = {
    "end to end": "11.9",
    "end to end, recomputed": "15.8",
    "append, 10 stacks": "29.7",
    "append, 20 stacks": "49.5",
    "append, bf16 cache": "15.8",
    "append, fp8 cache": "15.8",
    "prepend, 20 stacks": "87.1",
    "adapters on the trunk, 20 stacks": "87.1",
    "independent, 20 stacks": "11.9",
    "independent, one of 20 stacks": "0.6",
}


@pytest.fixture(scope="module")
def shape():
    return plan_shape("70b", device_named("h200"))


def test_the_70b_table(shape):
    assert f"{shape.block_parameters / 1e9:.4f}" == "0.8557"  # 0.8556 in matrices, the rest are norms
    assert f"{shape.trunk_parameters / 1e9:.2f}" == "68.45"
    rows = [
        (
            row.layout.name,
            tuple(
                round(n / 1e9, 1)
                for n in (row.frozen, row.trained, row.embedding_head, row.activations, row.adapters)
            ),
            round(row.total / 1e9),
            row.fits,
        )
        for row in shape.rows
    ]
    assert rows == TABLE


def test_days_per_billion_tokens(shape):
    assert {row.name: f"{row.days:.1f}" for row in shape.days} == DAYS
    assert shape.rate == 400e12
    assert round(shape.tokens_per_day / 1e6) == 84
    stored = {row.name: row.cache_bytes / 1e12 for row in shape.days if row.cache_bytes}
    assert {name: f"{n:.1f}" for name, n in stored.items()} == {
        "append, bf16 cache": "16.4",
        "append, fp8 cache": "8.2",
    }


def test_the_plan_of_a_shape_is_json(shape):
    assert json.loads(json.dumps(shape.to_dict()))["rows"][0]["total"] == shape.rows[0].total


@pytest.mark.parametrize("stacks", [1, 2, 5, 20])
def test_units_are_those_of_the_cost_model(stacks):
    """FLOP per token in multiples of the trunk's parameters, as the formulas of the cost model give them."""
    formulas = {
        ("end_to_end", False): 6,
        ("end_to_end", True): 8,
        ("append", False): stacks + 5,
        ("append_cached", False): 8,
        ("prepend", False): 2 * stacks + 4,
        ("prepend", True): 3 * stacks + 3,
        ("adapters", False): 2 * stacks + 4,
        ("adapters", True): 3 * stacks + 3,
        ("independent", False): 6,
        ("independent", True): 8,
    }
    for (scheme, recompute), multiple in formulas.items():
        assert rules.scheme_flops(scheme, 1.0, stacks, recompute) == pytest.approx(multiple), scheme


def test_a_faster_rate_takes_fewer_days(shape):
    doubled = plan_shape("70b", device_named("h200"), 2 * shape.rate)
    assert doubled.days[0].days == pytest.approx(shape.days[0].days / 2)
    assert doubled.rows == shape.rows


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        device_named("h20")
    with pytest.raises(ConfigError, match="did you mean '70b'"):
        plan_shape("70", DEVICES["h200"])
    with pytest.raises(ConfigError, match="cuda"):
        device_named("cuda:9")
    with pytest.raises(ValueError, match="append_cached"):
        rules.scheme_units("apend", 2)


def test_every_shape_can_be_laid_out_on_every_device():
    for name in SHAPES:
        for device in DEVICES.values():
            for row in plan_shape(name, device).rows:
                whole = row.total
                assert row.fits == (
                    "no" if whole > device.memory else "tight" if whole > 0.85 * device.memory else "yes"
                )


def test_the_devices_own_memory_and_speed_are_read():
    cpu = device_named("CPU")
    assert cpu.kind == "cpu"
    assert cpu.memory > 10**8
    assert cpu.rate("float32") > 1e8
