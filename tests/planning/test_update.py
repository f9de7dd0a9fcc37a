"""What the optimizer's step takes for a moment is what real steps take: Muon to the byte, Adam but for some scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stackwise.planning.live import LiveBytes
from stackwise.planning.update import Update, one_update, update_bytes
from stackwise.training import adam8bit
from stackwise.training.optim_kinds import make_optimizer
from stackwise.training.rounding import Rounding
from stackwise.training.settings import OptimizerSettings


def taken(kind, memory, shape, count, settings):
    """The most bytes that the second step of a real optimizer has alive on top of what it holds."""
    dtype = torch.bfloat16 if memory == "int8_nomaster" else torch.float32
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(count)]
    rounding = Rounding({p: str(i) for i, p in enumerate(parameters)}, 0)
    group = {"params": parameters, "lr": 1e-3, "weight_decay": settings.weight_decay}
    optimizer = make_optimizer(kind, memory, [group], settings, rounding)
    for parameter in parameters:
        parameter.grad = torch.randn(shape).to(dtype)
    optimizer.step()
    held = [t for p in parameters for t in (p, p.grad, *optimizer.state[p].values())]
    with LiveBytes(held) as live:
        optimizer.step()
    return live.peak


@pytest.mark.parametrize("memory", ["full", "int8", "int8_nomaster"])
@pytest.mark.parametrize("kind", ["AdamW", "Adam", "Muon"])
@pytest.mark.parametrize(("shape", "count"), [((64, 80), 1), ((80, 64), 3), ((300, 200), 2)])
def test_a_step_takes_what_was_planned(monkeypatch, kind, memory, shape, count):
    monkeypatch.setitem(adam8bit.PIECES, "cpu", 2**15)  # less than the largest tensor here
    settings = OptimizerSettings(optimizer_type=kind, memory=memory)
    planned = one_update(Update(kind, memory, shape), count, settings, "cpu")
    real = taken(kind, memory, shape, count, settings)
    assert real == planned if kind == "Muon" else abs(real - planned) < 1024
    if kind == "Muon" or memory != "full":
        assert planned > 0


def test_the_largest_counts(monkeypatch):
    settings = OptimizerSettings(memory="int8")
    small, large = Update("AdamW", "int8", (64, 64)), Update("AdamW", "int8", (128, 64))
    assert update_bytes({small: 50, large: 1}, settings, "cpu") == one_update(large, 1, settings, "cpu")
    assert update_bytes({}, settings, "cpu") == 0


def test_kernels_of_an_accelerator_update_fp32_weights_in_place():
    settings = OptimizerSettings(memory="int8")
    assert one_update(Update("AdamW", "int8", (512, 512)), 1, settings, "cuda") == 0
    assert one_update(Update("AdamW", "int8_nomaster", (512, 512)), 1, settings, "cuda") >= 20 * 512 * 512
