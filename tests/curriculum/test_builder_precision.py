"""Stacks of one builder in precisions of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from stackwise import ProgressiveRackBuilder
from stackwise.objectives.causal import CausalLM

SIZES: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "d_ff": 64, "n_heads": 4}
FORMATS = {"full": "fp32", "bfloat16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4", "nf4": "nf4"}


def step(builder: ProgressiveRackBuilder) -> tuple[float, dict[str, torch.Tensor]]:
    """One training step; the loss before it and the gradients."""
    rack = builder.build_rack()
    ids = torch.randint(0, 97, (2, 12))
    example = CausalLM().corrupt({"input_ids": ids})
    total, weight = CausalLM().loss(rack.forward_features(ids), rack.head, example)
    (total / weight).backward()
    gradients = {n: p.grad.clone() for n, p in rack.named_parameters() if p.grad is not None}
    parameters = [p for p in rack.parameters() if p.requires_grad]
    torch.optim.SGD(parameters, lr=0.1).step()
    return float(total.detach() / weight), gradients


@pytest.mark.parametrize("mode", FORMATS)
def test_a_mode_trains_in_fp32_masters_freezes_to_its_format_and_is_reported(mode: str) -> None:
    builder = ProgressiveRackBuilder(**SIZES)
    first = builder.append_stack(n_blocks=1, precision=mode)
    loss, gradients = step(builder)
    assert 0 < loss < 10
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    before = builder.get_stack_info(0)
    assert (before["precision"], before["weight_format"], before["frozen"]) == (mode, "fp32", False)
    builder.append_stack(n_blocks=1)
    builder.freeze_trunk()
    after = builder.get_stack_info(0)
    assert (after["precision"], after["weight_format"], after["frozen"]) == (mode, FORMATS[mode], True)
    assert after["total_parameters"] == before["total_parameters"]
    assert (after["bytes"] < before["bytes"]) == (mode != "full")
    packed = {n: t.clone() for n, t in first.state_dict().items()}
    loss, gradients = step(builder)
    assert not any(name.startswith("stacks.s0.") for name in gradients)
    assert any(name.startswith("stacks.s1.") for name in gradients)
    assert all(torch.equal(t, packed[n]) for n, t in first.state_dict().items())


def test_the_weights_from_before_come_back() -> None:
    builder = ProgressiveRackBuilder(**SIZES)
    stack = builder.append_stack(n_blocks=1, precision="nf4")
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    builder.append_stack(n_blocks=1)
    builder.freeze_trunk()
    with pytest.raises(ValueError, match="no stack is called 's9'"):
        builder.restore_full_precision("s9")
    builder.restore_full_precision("s0")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.state_dict().items())
    assert builder.build_rack().spec.stacks[0].weight_format == "fp32"


def test_qlora_is_a_stored_base_with_a_set_that_trains_and_says_so_once() -> None:
    from stackwise.precision.manager import note_qlora

    note_qlora.cache_clear()
    builder = ProgressiveRackBuilder(**SIZES)
    builder.append_stack(n_blocks=1)
    step(builder)
    with pytest.warns(UserWarning, match="qlora is shorthand"):
        builder.append_stack(n_blocks=1, precision="qlora", qlora_rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        builder.append_stack(n_blocks=1, precision="qlora", qlora_rank=4)
    info = builder.get_stack_info(1)
    assert (info["precision"], info["weight_format"], info["qlora_rank"]) == ("qlora", "nf4", 4)
    with pytest.warns(UserWarning, match="weights that no run has trained"):
        builder.freeze_all_but_qlora([1, 2])
    names = [name for name, p in builder.build_rack().named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_" in name for name in names)
    _, gradients = step(builder)
    assert set(gradients) == set(names)


def test_an_unknown_mode_lists_the_modes_and_half_is_refused_on_a_cpu() -> None:
    builder = ProgressiveRackBuilder(**SIZES)
    with pytest.raises(ValueError, match="known: full, half, bfloat16"):
        builder.append_stack(precision="int3")
    with pytest.raises(ValueError, match="nvfp4 and nf4"):
        builder.append_stack(precision="fp4")
    with pytest.raises(ValueError, match="no float16 arithmetic"):
        builder.append_stack(precision="half")
    with pytest.raises(ValueError, match="unknown precision 'ful'"):
        ProgressiveRackBuilder(default_precision="ful", **SIZES)
