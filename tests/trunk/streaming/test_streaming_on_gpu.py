"""On a CUDA device copies run on streams of their own; numbers stay, and the allocator's peak knows no depth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from stackwise.training.counting import StepBytes
from stackwise.training.optim import Optimizers
from stackwise.trunk.residency import reside

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STREAMED = {"frozen": "streamed", "trained": "streamed"}
WIDE: dict[str, Any] = {"d_model": 256, "n_heads": 4, "max_seq_len": 256}


@pytest.fixture
def cuda():
    return torch.device("cuda", torch.cuda.current_device())


def steps(lab, rack, prefix, selectors, device, n=3, half=False):
    """A few optimizer steps; returns the counted bytes of the first."""
    optimizers = Optimizers(rack, lab.stage(rack, *selectors), lab.config(1).training)
    for step in range(n):
        count = StepBytes(rack)
        with count.counting():
            for part in range(2):
                ids = lab.ids(8, 256, seed=2 * step + part).to(device)
                with torch.autocast("cuda", torch.bfloat16, enabled=half):
                    loss = rack.head(rack.forward_features(ids, prefix=prefix)).float().square().mean()
                loss.backward()
                del loss
        optimizers.step()
        if step == 0:
            result = count.result(optimizers)
        optimizers.zero_grad()
    return result


@pytest.mark.parametrize("selectors", [("all",), ("new", "tail", "norm", "head"), ("stack:0",)], ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_training_is_that_of_the_resident_rack(lab, cuda, selectors, half):
    rack = lab.rack(5, **WIDE)
    prefix = lab.train(rack, *selectors).prefix
    twin = copy.deepcopy(rack)
    reside(rack, cuda)
    reside(twin, cuda, **STREAMED)
    weights = [p for block in twin.blocks() for p in block.parameters()]
    assert all(p.is_pinned() for p in weights)
    for each in (rack, twin):
        steps(lab, each, prefix, selectors, cuda, half=half)
    state = twin.state_dict()
    for name, tensor in rack.state_dict().items():  # kernels that add in any order leave the last bits open
        torch.testing.assert_close(state[name].cpu(), tensor.cpu(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("selectors", [("all",), ("stack:0",)], ids=str)
def test_the_allocators_peak_is_flat_and_the_counted_one(lab, cuda, selectors, half):
    peaks = []
    for n in (4, 16):
        rack = lab.rack(n, **WIDE)
        prefix = lab.train(rack, *selectors).prefix
        reside(rack, cuda, **STREAMED)
        before = torch.cuda.memory_allocated(cuda)
        counted = steps(lab, rack, prefix, selectors, cuda, n=1, half=half)
        peaks.append(counted["allocated"] - before + counted["parameters"])
        assert peaks[-1] >= 0.95 * (counted["peak"] - counted["moments"])
        del rack
        torch.cuda.empty_cache()
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


def test_frozen_files_serve_a_device(lab, cuda, tmp_path):
    rack = lab.rack(4, **WIDE)
    prefix = lab.train(rack, "new", "head").prefix
    twin = copy.deepcopy(rack)
    reside(rack, cuda)
    reside(twin, cuda, frozen="mapped", folder=tmp_path)
    ids = lab.ids(8, 256).to(cuda)
    with torch.no_grad():
        torch.testing.assert_close(
            twin.forward_features(ids, prefix=prefix), rack.forward_features(ids, prefix=prefix)
        )
