"""Budgets: a config trains as long as given FLOPs or tokens last, counted as its run counts them."""

from __future__ import annotations

import random

import pytest

from stackwise.planning.budget import cost_of, largest_within, matched, nearest
from stackwise.planning.facts import data_facts
from stackwise.training.run import train

PROGRESSIVE = {
    "append": {"cache_activations": False},
    "append, stored": {"cache_activations": True, "joint_tuning": False},
    "decided by the run": {"cache_activations": "auto", "cache_ram_bytes": 10**8},
    "prepend": {"building_mode": "prepend"},
    "grow": {"building_mode": "grow", "growth_factor": 3},
    "cyclic": {"building_mode": "cyclic"},
    "cyclic by visits": {"building_mode": "cyclic", "cycle_steps": 2},
    "end to end": {"enabled": False},
}


@pytest.fixture(params=PROGRESSIVE)
def config(request, tiny):
    return tiny(**{f"training.progressive.{key}": value for key, value in PROGRESSIVE[request.param].items()})


def facts(config):
    from stackwise.data.prepare import prepare

    return data_facts(config, prepare(config.data, config.checkpoint.dir + "/.data"))


def test_a_run_costs_what_was_asked_for_as_nearly_as_its_steps_allow(config):
    data, axis = facts(config), random.choice(["flops", "tokens"])
    target = random.uniform(3, 9) * cost_of(config, axis, data)
    fitted = matched(config, axis, target, data)
    cost = cost_of(fitted, axis, data)
    key = "cycle_steps" if config.training.progressive.cycle_steps else "max_steps"
    for other in (-1, 1):
        changed = fitted.model_copy(deep=True)
        section = changed.training.progressive if key == "cycle_steps" else changed.training
        setattr(section, key, getattr(section, key) + other)
        assert abs(cost - target) <= abs(cost_of(changed, axis, data) - target)


def test_the_cost_is_what_the_run_counts(config):
    data = facts(config)
    result = train(config, sinks=[], report=False)
    assert result["flops"] == pytest.approx(cost_of(config, "flops", data), rel=1e-9)
    assert result["tokens"] == cost_of(config, "tokens", data)


def test_hand_written_stages_keep_their_proportions(tiny):
    stages = [
        {"name": "a", "train": ["embedding", "stack:0", "head"], "max_steps": 4},
        {"name": "b", "grow": {"op": "append", "n_blocks": 1}, "train": ["new", "head"], "max_tokens": 96},
    ]
    config = tiny(training__stages=stages, model__architecture__n_stacks=1)
    data = facts(config)
    fitted = matched(config, "tokens", 30 * 48, data)
    first, second = fitted.training.stages
    assert (first.max_steps, second.max_steps, second.max_tokens) == (20, 10, None)
    assert cost_of(fitted, "tokens", data) == 30 * 48


def test_the_nearest_budget_and_the_largest_that_is_enough():
    step = random.uniform(0.5, 3.0)
    for _ in range(30):
        target = random.uniform(step, 1000 * step)
        n = nearest(lambda n: n * step, target)
        assert abs(n * step - target) <= step / 2 + 1e-9
        within = largest_within(lambda n: n * step, target)
        assert within * step <= target < (within + 1) * step
    assert nearest(lambda n: n * 10.0, 1.0) == largest_within(lambda n: n * 10.0, 1.0) == 1
