"""The plan is what the run then does."""

from __future__ import annotations

import os

import pytest

from stackwise import plan, train


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD", "Muon"])
def test_planned_stages_equal_the_stages_of_the_run(tiny, optimizer):
    config = tiny(training__optimizer__optimizer_type=optimizer, model__short_conv=2, model__bias=True)
    planned = plan(config).stages
    history = train(config, sinks=[])["training_history"]
    assert [s.name for s in planned] == [h["name"] for h in history]
    for stage, entry in zip(planned, history, strict=True):
        assert stage.steps == entry["steps"]
        assert stage.tokens == entry["tokens"]
        assert stage.flops == pytest.approx(entry["flops"], rel=1e-9)
        assert stage.trainable_parameters == entry["trainable_params"]
        for item, count in stage.bytes.items():
            assert entry["bytes"][item] == count, (stage.name, item)


def test_a_budget_in_epochs_is_read_off_the_data(tiny):
    config = tiny(training__max_steps=None, training__epochs_per_stack=2)
    tokens = plan(config).stages[0].tokens
    text = 85 * 40 * 9 // 10  # characters of the training split, about
    assert tokens == pytest.approx(2 * text, rel=0.1)


def test_growth_and_freezing_are_told(tiny):
    stages = plan(tiny()).stages
    assert stages[0].grows == ""
    assert stages[1].grows == "append 1 (copy)"
    assert [s.prefix_blocks for s in stages] == [0, 1, 2, 0]
    assert [s.n_stacks for s in stages] == [1, 2, 3, 3]
    assert plan(tiny()).to_dict()["peak_bytes"] == sum(stages[-1].bytes.values())
