"""Modes of the optimizer's memory in whole runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackwise.model.rack import Rack
from stackwise.training import loop
from stackwise.training.run import train
from stackwise.training.stored import open_run

MODES = ("full", "int8", "int8_nomaster", "fused")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(config) -> tuple[dict, Rack]:
    result = train(config, sinks=[])
    return result, open_run(result["run_dir"]).rack


SHORT = {
    "model__d_model": 64,
    "training__dtype": "bfloat16",
    "training__max_grad_norm": 0.0,
    "training__progressive__target_stacks": 2,
}


@pytest.mark.parametrize("memory", MODES[1:])
def test_a_run_that_was_interrupted_between_saves_ends_with_the_same_bits(tiny, monkeypatch, memory):
    changes = {**SHORT, "training__optimizer__memory": memory}
    _, whole = run(tiny(**changes, training__run_id="whole"))
    original = loop.Engine._train_step

    def stops(self, stage):
        if self.progress.step == 7:  # one step after a save, in the second stage
            raise KeyboardInterrupt
        original(self, stage)

    monkeypatch.setattr(loop.Engine, "_train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(**changes, training__run_id="cut"))
    monkeypatch.setattr(loop.Engine, "_train_step", original)
    result, cut = run(tiny(**changes, training__run_id="cut"))
    assert result["resumed_from"] is not None
    assert same(cut.state_dict(), whole.state_dict())


def test_every_mode_learns_what_adamw_learns(tiny):
    """After 90 steps on a short text the held-out losses are within 3 % of that of fp32."""
    losses = {}
    for memory in MODES:
        config = tiny(
            **{
                **SHORT,
                "training__progressive__enabled": False,
                "model__architecture__n_stacks": 1,
                "training__max_steps": 90,
                "training__optimizer__memory": memory,
                "training__run_id": memory,
                "checkpoint__save_interval": 1000,
            }
        )
        result, rack = run(config)
        losses[memory] = result["eval_loss"]
        assert rack.dtype == torch.float32  # stored weights are read into fp32
    assert losses["full"] < 1.0
    for loss in losses.values():
        assert loss == pytest.approx(losses["full"], rel=0.03), losses
