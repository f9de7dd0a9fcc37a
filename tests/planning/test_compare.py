"""Curricula side by side, and advice that is known to fit."""

from __future__ import annotations

import json

import pytest

from stackwise.config.errors import ConfigError
from stackwise.planning.advice import advise
from stackwise.planning.compare import CURRICULA, compare, with_changes
from stackwise.planning.plan import plan


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    from stackwise.config.root import StackWiseConfig

    folder = tmp_path_factory.mktemp("plan")
    (folder / "text.txt").write_text("to be or not to be " * 100)
    config = StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 16,
                "n_heads": 2,
                "max_seq_len": 32,
                "architecture": {"n_stacks": 3, "blocks_per_stack": 1},
            },
            "training": {
                "batch_size": 8,
                "seq_len": 32,
                "max_steps": 10,
                "device": "cpu",
                "dtype": "float32",
                "progressive": {"joint_tuning": False},
            },
            "data": {"source": "text", "path": str(folder / "text.txt")},
            "checkpoint": {"dir": str(folder / "runs")},
        }
    )
    own = plan(config, budget_gib=1)
    return config, own, compare(config, own)


def test_every_curriculum_is_planned_for_the_same_model(compared):
    _, own, comparison = compared
    rows = {row.name: row for row in comparison.rows}
    assert rows.keys() == CURRICULA.keys()
    finals = {row.plan.stages[-1].total_blocks for row in rows.values() if row.name != "independent"}
    assert finals == {3}, [row.problem for row in rows.values()]
    for row in rows.values():
        assert row.hours == pytest.approx(row.flops / own.rate / 3600)
        assert row.flops / own.total_tokens == pytest.approx(own.total_flops / row.tokens)


def test_costs_and_memory_are_in_their_known_order(compared):
    rows = {row.name: row for row in compared[2].rows}
    flops = {name: row.flops for name, row in rows.items()}
    peaks = {name: row.plan.peak_bytes for name, row in rows.items()}
    assert flops["append"] < flops["prepend"] < flops["end to end"]
    assert flops["grow"] < flops["end to end"]
    assert flops["append, trunk stored"] < flops["append"]
    assert peaks["append"] < peaks["prepend"] < peaks["end to end"]
    assert peaks["append, joint phase"] == peaks["end to end"]
    streamed, resident = (rows[name].plan for name in ("append, trunk streamed", "append"))
    assert streamed.stages[-1].bytes["parameters"] < resident.stages[-1].bytes["parameters"]
    assert streamed.host_bytes > resident.host_bytes == 0
    assert rows["append, trunk stored"].plan.stages[1].trunk == "cached"


def test_the_cheapest_that_fits_is_named(compared):
    config, _, comparison = compared
    fitting = min(comparison.rows, key=lambda row: row.flops)
    assert comparison.cheapest == fitting
    most = max(row.plan.peak_bytes for row in comparison.rows)
    least = min(row.plan.peak_bytes for row in comparison.rows)
    tight = plan(config, budget_gib=(least + (most - least) / 4) / 2**30)
    rows = compare(config, tight)
    assert rows.cheapest.plan.fits != "no"
    assert all(row.flops >= rows.cheapest.flops for row in rows.rows if row.plan.fits != "no")
    assert json.loads(json.dumps(rows.to_dict()))["cheapest"] == rows.cheapest.name
    nothing = compare(config, plan(config, budget_gib=least / 2 / 2**30))
    assert nothing.cheapest is None


def test_a_curriculum_that_cannot_run_says_why(tiny):
    config = tiny(model__vocab_size=31, model__architecture__n_stacks=1)
    comparison = compare(config, plan(config, budget_gib=1))
    problems = {row.name: row.problem for row in comparison.rows if row.plan is None}
    assert "grow" in problems
    assert "stack" in problems["grow"]
    with pytest.raises(ConfigError, match="target_stacks"):
        with_changes(config, {"training.progressive.target_stacks": 99})


@pytest.fixture
def alone(tiny):
    """One end-to-end stage, which is quickly planned."""
    return tiny(
        model__architecture__n_stacks=1,
        model__vocab_size=31,
        training__progressive__enabled=False,
        training__batch_size=4,
    )


def test_advice_is_known_to_fit(alone):
    budget = 0.85 * plan(alone, budget_gib=1).peak_bytes / 2**30
    tight = plan(alone, budget_gib=budget)
    assert tight.fits == "no"
    advice = advise(alone, tight)
    assert any("training.batch_size" in each.changes for each in advice)
    assert [each.plan.hours for each in advice] == sorted(each.plan.hours for each in advice)
    for each in advice:
        assert each.fits
        changed = plan(with_changes(alone, each.changes), budget_gib=budget)
        assert changed.peak_bytes == each.plan.peak_bytes
        assert changed.total_tokens == tight.total_tokens, "the run trains on the same tokens"


def test_changes_are_put_together_where_one_is_not_enough(alone):
    alone.training.gradient_checkpointing = True
    own = plan(alone, budget_gib=1)
    (advice,) = advise(alone, plan(alone, budget_gib=own.peak_bytes / 2.2 / 2**30))
    assert len(advice.changes) > 2
    assert advice.fits
    assert all(f"{key}=" in advice.overrides() for key in advice.changes)
