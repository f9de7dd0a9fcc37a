"""The benchmark of mixtures of experts runs, and compares models that compute the same."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")


@pytest.fixture
def moe_step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    sys.modules.pop("moe_step", None)
    import moe_step

    return moe_step


def test_both_sides_have_the_same_logits_and_losses(moe_step):
    shape = moe_step.Shape(16, 24, 4, 2, 2, 2, 1, 8, 2, 61)
    steps = moe_step.contenders(shape)  # raises where logits differ
    first = {name: float(step()) for name, step in steps.items()}
    # Mixtral averages the losses of the routers over the layers, and its loss has them inside
    plain = [first[moe_step.OURS], first[moe_step.PLAIN]]
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)
    for name, loss in first.items():
        if name.startswith(moe_step.DEFAULT):
            assert 0 < loss - plain[0] < 0.1


def test_the_floor_multiplies_what_a_step_multiplies(moe_step):
    shape = moe_step.Shape(16, 24, 4, 2, 2, 2, 1, 8, 2, 61)
    rack, loss = moe_step.stackwise(shape, torch.randint(0, 61, (2, 8)))
    counts = []
    for step in (moe_step.stepper(rack, loss), moe_step.floor(shape, list(rack.parameters()))):
        with FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    routers = 3 * 2 * 16 * 16 * 4 * 2  # passes, operations, tokens, width, experts, layers
    assert counts[0] == counts[1] + routers


def test_other_weights_are_refused(moe_step, monkeypatch):
    monkeypatch.setattr(moe_step, "take_over", lambda rack, model: None)
    with pytest.raises(RuntimeError, match="away from StackWise's"):
        moe_step.contenders(moe_step.Shape(16, 24, 4, 2, 1, 2, 1, 8, 2, 61))
