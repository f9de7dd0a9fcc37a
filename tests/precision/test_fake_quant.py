"""Training on rounded matrices: the forward pass of the frozen format, the gradient of the plain one."""

from __future__ import annotations

import copy

import pytest
import torch

from stackwise import create_simple_rack
from stackwise.inference.plan import uncovered
from stackwise.model.linear import Linear
from stackwise.precision.convert import freeze_stack, linear_layers
from stackwise.precision.fake_quant import Rounding, fake_quantise
from stackwise.precision.formats import FORMATS, format_of

STORED = [name for name in FORMATS if name != "fp32"]


@pytest.mark.parametrize("name", STORED)
def test_freezing_a_stack_trained_so_changes_nothing(name: str) -> None:
    rack = create_simple_rack(2, 1, 32, 64, 4, 50, tie_embeddings=False)
    stack, ids = rack.stacks[0], torch.randint(0, 50, (2, 9))
    names = list(rack.state_dict())
    plain = rack(ids).detach()
    fake_quantise(stack, name)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    for _ in range(2):
        rack(ids).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stack.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert list(rack.state_dict()) == names
    rounded = rack(ids).detach()
    fake_quantise(stack, None)
    assert not torch.equal(rack(ids), rounded)
    freeze_stack(stack, name)
    assert torch.equal(rack(ids), rounded)
    assert not torch.equal(rounded, plain)


@pytest.mark.parametrize("name", STORED)
def test_the_gradient_is_that_of_a_layer_with_the_rounded_matrix(name: str) -> None:
    layer = Linear(40, 24)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(format_of(name).round(layer.weight))
    layer.rounding = Rounding(name)
    x = torch.randn(6, 40)
    assert torch.equal(layer(x), dense(x))
    for own in (layer, dense):
        own(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_fp32_and_null_round_nothing_and_frozen_layers_are_left_alone() -> None:
    rack = create_simple_rack(2, 1, 32, 64, 4, 50)
    first, second = rack.stacks
    freeze_stack(first, "nf4")
    for stack in (first, second):
        fake_quantise(stack, "nf4")
    assert all(layer.rounding is None for layer in linear_layers(first).values())
    assert all(layer.rounding is not None for layer in linear_layers(second).values())
    assert uncovered(rack) is not None
    for off in ("fp32", None):
        fake_quantise(second, "nf4")
        fake_quantise(second, off)
        assert all(layer.rounding is None for layer in linear_layers(second).values())
    with pytest.raises(ValueError, match="unknown weight format 'int3'"):
        fake_quantise(second, "int3")


def test_cached_decoding_does_not_go_around_the_rounding() -> None:
    rack = create_simple_rack(1, 1, 32, 64, 4, 50, attention_preset="gpt_style")
    assert uncovered(rack) is None
    fake_quantise(rack.stacks[0], "nf4")
    assert "rounds its matrix" in str(uncovered(rack))
