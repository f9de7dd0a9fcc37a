"""A stack in and out of its frozen format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stackwise import Stack, create_simple_rack
from stackwise.curriculum.split import apply_training
from stackwise.model.block import Context
from stackwise.model.files import load_tensors, save_tensors
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec
from stackwise.model.visibility import Visibility
from stackwise.precision.convert import (
    dense_tensors,
    freeze_stack,
    linear_layers,
    refuse_bare_training,
    restore_full_precision,
    shape_stack,
    stack_bytes,
)
from stackwise.precision.formats import FORMATS, format_of, weight_bytes
from stackwise.precision.frozen_linear import FrozenLinear

STORED = [name for name in FORMATS if name != "fp32"]
ERROR = {"fp16": 1e-2, "bf16": 1e-2, "fp8": 0.04, "nvfp4": 0.15, "nf4": 0.15}


def make(d_model: int = 32, **options: object) -> Rack:
    """A bidirectional rack of two stacks, with norms, biases and matrices away from their start."""
    rack = create_simple_rack(2, 2, d_model, 2 * d_model, 4, 50, bias=True, tie_embeddings=False, **options)
    with torch.no_grad():
        for parameter in rack.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return rack


def ids() -> Tensor:
    return torch.randint(0, 50, (2, 9))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k].double(), right[k].double()) for k in left)


@pytest.mark.parametrize("name", STORED)
def test_the_frozen_stack_computes_what_its_dequantised_weights_compute(name: str) -> None:
    rack, inputs = make(), ids()
    before = rack(inputs).detach()
    freeze_stack(rack.stacks[0], name)
    frozen = rack(inputs).detach()
    assert not torch.equal(frozen, before)
    restore_full_precision(rack.stacks[0])
    assert not any(isinstance(module, FrozenLinear) for module in rack.modules())
    torch.testing.assert_close(rack(inputs).detach(), frozen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STORED)
def test_errors_and_gradients_of_a_stack(name: str) -> None:
    stack = create_simple_rack(1, 2, 64, 64, 4, 50, seed=int(torch.randint(1000, ()))).stacks[0]
    x, context = torch.randn(2, 16, 64, requires_grad=True), Context(Visibility(16), None, 64)
    before = stack(x, context).detach()
    freeze_stack(stack, name)
    after = stack(x, context)
    assert 0 < (after - before).norm() / before.norm() < ERROR[name]
    (frozen,) = torch.autograd.grad(after.square().sum(), x)
    restore_full_precision(stack)
    (dense,) = torch.autograd.grad(stack(x, context).square().sum(), x)
    assert torch.isfinite(frozen).all()
    torch.testing.assert_close(frozen, dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))


@pytest.mark.parametrize("name", STORED)
def test_every_matrix_is_stored_in_the_format_and_nothing_else(name: str) -> None:
    stack = make(64).stacks[0]
    plain = {key: tensor for key, tensor in dense_tensors(stack).items() if not key.endswith(".weight")}
    norms = {key: tensor for key, tensor in snapshot(stack).items() if "norm" in key}
    matrices = {key: tuple(layer.weight.shape) for key, layer in linear_layers(stack).items()}
    assert len(matrices) == 2 * 7
    kept = sum(tensor.nbytes for tensor in snapshot(stack).values()) - sum(
        4 * a * b for a, b in matrices.values()
    )
    freeze_stack(stack, name)
    layers = linear_layers(stack)
    assert all(
        isinstance(layer, FrozenLinear) and layer.format is format_of(name) for layer in layers.values()
    )
    assert stack.weight_format == stack.spec.weight_format == name
    assert stack_bytes(stack) == kept + sum(weight_bytes(shape, name) for shape in matrices.values())
    assert stack_bytes(stack) == sum(tensor.nbytes for tensor in stack.state_dict().values())
    after = stack.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in (plain | norms).items())
    assert all(tensor.dtype == torch.float32 for tensor in stack.parameters())


@pytest.mark.parametrize("name", STORED)
def test_the_bytes_of_a_description_are_those_of_the_stack(name: str) -> None:
    for options in (
        {},
        {"short_conv": 3, "attention_preset": "gpt_style"},
        {"n_kv_heads": 2, "ffn_type": "gelu"},
    ):
        stack = make(**options).stacks[1]  # type: ignore[arg-type]
        full = stack_bytes(stack)
        assert full == stack_bytes(stack.spec) == sum(p.nbytes for p in stack.parameters())
        freeze_stack(stack, name)
        assert stack_bytes(stack.spec) == stack_bytes(stack) < full


@pytest.mark.parametrize("name", FORMATS)
def test_freezing_drops_gradients_and_happens_once(name: str) -> None:
    rack = make()
    stack = rack.stacks[0]
    rack(ids()).sum().backward()
    freeze_stack(stack, name)
    assert all(not p.requires_grad and p.grad is None for p in stack.parameters())
    assert not any(module.training for module in stack.modules())
    first = snapshot(stack)
    freeze_stack(stack, name)
    assert equal(first, snapshot(stack))
    other = "nf4" if name != "nf4" else "fp8"
    if name == "fp32":
        freeze_stack(stack, other)
        assert stack.weight_format == other
    else:
        with pytest.raises(
            ValueError, match=f"stored as {name} and cannot be stored as {other}.*restore_full"
        ):
            freeze_stack(stack, other)
        assert equal(first, snapshot(stack))


@pytest.mark.parametrize("name", STORED)
def test_training_another_stack_through_it_leaves_its_bytes_alone(name: str) -> None:
    rack = make()
    first, last = rack.stacks
    freeze_stack(last, name)
    before, embedding = snapshot(last), rack.embedding.weight.detach().clone()
    optimizer = torch.optim.AdamW(
        [p for p in rack.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    for _ in range(2):
        rack(ids()).square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in first.parameters())
        assert all(p.grad.abs().sum() > 0 for p in first.blocks[0].ffn.parameters())  # type: ignore[union-attr]
        optimizer.step()
    assert equal(before, snapshot(last))
    assert not torch.equal(rack.embedding.weight, embedding)


@pytest.mark.parametrize("name", STORED)
def test_full_precision_comes_back_exactly_from_the_copy(name: str) -> None:
    rack, inputs = make(short_conv=2, attention_preset="gpt_style"), ids()
    stack = rack.stacks[0]
    before, logits = snapshot(stack), rack(inputs).detach()
    backup = {key: tensor.clone() for key, tensor in dense_tensors(stack).items()}
    assert equal(backup, before)
    freeze_stack(stack, name)
    rounded = dense_tensors(stack)
    assert rounded.keys() == before.keys()
    assert not equal(rounded, before)
    with torch.no_grad():  # the copy holds the whole stack
        stack.blocks[0].attn_norm.weight.add_(1)  # type: ignore[union-attr, operator]
    restore_full_precision(stack, backup)
    assert stack.weight_format == "fp32"
    assert equal(before, snapshot(stack))
    assert torch.equal(rack(inputs).detach(), logits)
    assert not any(p.requires_grad for p in stack.parameters())
    with torch.no_grad():  # and the copy is not the stack's own
        next(iter(linear_layers(stack).values())).weight.zero_()
    assert equal(backup, before)


def test_a_copy_that_does_not_fit_names_every_tensor_and_changes_nothing() -> None:
    stack = make().stacks[0]
    backup = {key: tensor.clone() for key, tensor in dense_tensors(stack).items()}
    freeze_stack(stack, "nf4")
    before = snapshot(stack)
    del backup["blocks.0.attn.q.weight"]
    backup["blocks.9.ffn.up.weight"] = torch.zeros(1)
    backup["blocks.1.ffn.down.weight"] = torch.zeros(2, 3)
    with pytest.raises(ValueError) as error:
        restore_full_precision(stack, backup)
    for part in (
        "missing blocks.0.attn.q.weight",
        "unknown blocks.9.ffn.up.weight",
        "[2, 3], needed [32, 64]",
    ):
        assert part in str(error.value)
    assert stack.weight_format == "nf4"
    assert equal(before, snapshot(stack))


@pytest.mark.parametrize("name", STORED)
def test_a_stack_loads_by_name_into_the_modules_of_its_format(name: str, tmp_path: Path) -> None:
    rack, other, inputs = make(), make(), ids()
    freeze_stack(rack.stacks[0], name)
    path = save_tensors(tmp_path / "stack.safetensors", rack.stacks[0].state_dict(), {"kind": "stack"})
    tensors, _ = load_tensors(path)
    shape_stack(other.stacks[0], name)
    other.load_state_dict({**rack.state_dict(), **{f"stacks.s0.{key}": t for key, t in tensors.items()}})
    assert torch.equal(rack(inputs), other(inputs))
    spec = rack.stacks[0].spec
    with torch.device("meta"):
        empty = Stack.from_spec(spec, 0)
    shape_stack(empty, name)
    assert empty.spec == spec
    shapes = {key: (t.shape, t.dtype) for key, t in rack.stacks[0].state_dict().items()}
    assert {key: (t.shape, t.dtype) for key, t in empty.state_dict().items()} == shapes
    empty.load_state_dict(tensors, assign=True)
    assert equal(snapshot(empty), snapshot(rack.stacks[0]))


@pytest.mark.parametrize("name", STORED)
def test_a_stack_without_values_is_converted_like_one_with(name: str) -> None:
    with torch.device("meta"):
        rack = make()
    freeze_stack(rack.stacks[0], name)
    assert all(tensor.is_meta for tensor in rack.stacks[0].state_dict().values())
    assert stack_bytes(rack.stacks[0]) == stack_bytes(rack.stacks[0].spec)
    restore_full_precision(rack.stacks[0])
    assert rack.stacks[0].state_dict().keys() == rack.stacks[1].state_dict().keys()


def test_layers_below_adapters_are_converted_and_the_adapters_are_not() -> None:
    peft = pytest.importorskip("peft")
    rack, inputs = make(), ids()
    stack = rack.stacks[0]
    dense = dense_tensors(stack)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q", "down"]), stack)
    with torch.no_grad():
        for key, parameter in stack.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    assert dense_tensors(stack).keys() == dense.keys()
    assert linear_layers(stack).keys() == {key.removesuffix(".weight") for key in dense if _is_matrix(key)}
    before = rack(inputs).detach()
    backup = {key: tensor.clone() for key, tensor in dense_tensors(stack).items()}
    freeze_stack(stack, "bf16")
    adapters = [
        module for key, module in stack.named_modules() if ".lora_" in key and isinstance(module, nn.Linear)
    ]
    assert len(adapters) == 2 * 2 * 2
    assert all(type(module) is nn.Linear for module in adapters)
    assert sum(isinstance(module, FrozenLinear) for module in stack.modules()) == 2 * 7
    after = rack(inputs).detach()
    assert 0 < (after - before).norm() / before.norm() < 0.05
    restore_full_precision(stack, backup)
    assert torch.equal(rack(inputs).detach(), before)


def _is_matrix(key: str) -> bool:
    return key.endswith(".weight") and ".attn_norm" not in key and ".ffn_norm" not in key


@pytest.mark.parametrize("name", STORED)
def test_thawing_a_stack_never_thaws_its_stored_matrices(name: str) -> None:
    rack = make()
    stack = rack.stacks[0]
    refuse_bare_training(stack)
    freeze_stack(stack, name)
    with pytest.raises(
        ValueError, match=f"'s0' is stored as {name} and cannot be trained by itself: add adapters"
    ):
        refuse_bare_training(stack)
    with pytest.raises(ValueError, match="cannot be trained by itself: add adapters"):
        apply_training(rack, {"block:s0.1", "norm"})
    apply_training(rack, {"stack:s1", "norm"})
    stack.unfreeze_all()
    assert not any(layer.weight.requires_grad for layer in linear_layers(stack).values())
    stack.adapters = (AdapterSpec("stack"),)
    refuse_bare_training(stack)


def test_an_unknown_format_changes_nothing() -> None:
    stack = make().stacks[0]
    before = snapshot(stack)
    for convert in (freeze_stack, shape_stack):
        with pytest.raises(
            ValueError, match="unknown weight format 'int3'; known: fp32, fp16, bf16, fp8, nvfp4, nf4"
        ):
            convert(stack, "int3")
    assert equal(before, snapshot(stack))
    assert all(p.requires_grad for p in stack.parameters())
