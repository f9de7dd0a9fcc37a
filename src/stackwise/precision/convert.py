"""A stack in and out of its frozen format.

What is converted are the matrices of the plain linear layers of its blocks. Norms, biases, short convolutions and the
stack's adapters stay as they are, and so do layers of classes of your own, which may hold anything. Where an adapter
wraps a layer, the layer it wraps (its `base_layer`) is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stackwise.model.block import Stack
from stackwise.model.linear import Linear
from stackwise.model.spec import StackSpec
from stackwise.model.spectral import SpectralLinear, fold_spectral_norm
from stackwise.precision.formats import format_of
from stackwise.precision.frozen_linear import WAYS_OUT, FrozenLinear


class Place(NamedTuple):
    """Where a module sits. `name` is the one it has without adapters around it."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module


def _places(module: nn.Module, prefix: str = "") -> Iterator[Place]:
    """Every module below `module`, adapters left out."""
    for attribute, child in list(module.named_children()):
        name, parent = prefix + attribute, module
        while "base_layer" in child._modules:
            parent, attribute, child = child, "base_layer", child._modules["base_layer"]  # type: ignore[assignment]
        yield Place(name, parent, attribute, child)
        yield from _places(child, f"{name}.")


_CONVERTED = (nn.Linear, Linear, SpectralLinear, FrozenLinear)


def linear_layers(stack: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that a format applies to, frozen ones included, by the names of the plain fp32 stack."""
    return {place.name: place.module for place in _linear_places(stack)}  # type: ignore[misc]


def _linear_places(stack: nn.Module) -> list[Place]:
    return [place for place in _places(stack) if type(place.module) in _CONVERTED]


@torch.no_grad()
def freeze_stack(stack: Stack, format: str) -> None:
    """Freeze a trained stack and store its matrices in a format, for good: once, and in place.

    Gradients are dropped, the stack is in eval mode. A stack that is stored in another format already: ValueError, for
    what the first rounding took cannot be had back from it. fp32 stores it as it is.
    """
    fold_spectral_norm(stack)
    _convert(stack, format, FrozenLinear.of)
    stack.freeze_all()
    for parameter in stack.parameters():
        parameter.grad = None


def shape_stack(stack: Stack, format: str) -> None:
    """Give a new stack the modules of a format without values, to be loaded by name. Any device, meta included."""
    _convert(stack, format, FrozenLinear.shaped_like)


def _convert(stack: Stack, format: str, make: Callable[[nn.Linear, str], FrozenLinear]) -> None:
    format_of(format)
    if stack.weight_format == format:
        return
    if stack.weight_format != "fp32":
        raise ValueError(
            f"stack {stack.uid!r} is stored as {stack.weight_format} and cannot be stored as {format} from there: put "
            "its full-precision weights back first (restore_full_precision)"
        )
    for place in _linear_places(stack):
        setattr(place.parent, place.attribute, make(place.module, format))  # type: ignore[arg-type]
    stack.weight_format = format


@torch.no_grad()
def dense_tensors(stack: Stack) -> dict[str, Tensor]:
    """The stack's tensors under the names of the plain fp32 stack: matrices unpacked or divided by their norms,
    adapters left out.

    What is stored in fp32 is given as it is, not copied. Taken before `freeze_stack`, this is the full-precision copy
    that `restore_full_precision` puts back.
    """
    tensors: dict[str, Tensor] = {}
    for place in _places(stack):
        if isinstance(place.module, FrozenLinear):
            tensors[f"{place.name}.weight"] = place.module.weight
        elif isinstance(place.module, SpectralLinear):
            tensors |= place.module.plain_tensors(f"{place.name}.")
            continue
        else:
            own = place.module.named_buffers(recurse=False)
            skipped = place.module._non_persistent_buffers_set
            tensors |= {f"{place.name}.{name}": tensor for name, tensor in own if name not in skipped}
        for name, parameter in place.module.named_parameters(recurse=False):
            tensors[f"{place.name}.{name}"] = parameter.detach()
    return tensors


@torch.no_grad()
def restore_full_precision(stack: Stack, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Make the layers of a stored stack plain fp32 layers again, in place; it stays frozen.

    `tensors`: what `dense_tensors` gave before the conversion. null: the stored values, with what rounding has made of
    them. Adapters stay where they are. A missing, unknown or misshapen tensor: ValueError naming all of them.
    """
    if tensors is not None:
        _check_names(stack, tensors)
    given = tensors or {}
    for place in _linear_places(stack):
        if isinstance(place.module, FrozenLinear):
            dense = place.module.dense(given.get(f"{place.name}.weight"))
            setattr(place.parent, place.attribute, dense.requires_grad_(False))
    stack.weight_format = "fp32"
    own = dense_tensors(stack)
    for name, tensor in given.items():
        own[name].copy_(tensor)


def _check_names(stack: Stack, tensors: Mapping[str, Tensor]) -> None:
    needed = {name: list(tensor.shape) for name, tensor in dense_tensors(stack).items()}
    problems = [f"missing {name}" for name in needed.keys() - tensors.keys()]
    problems += [f"unknown {name}" for name in tensors.keys() - needed.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, needed {needed[name]}"
        for name in needed.keys() & tensors.keys()
        if list(tensors[name].shape) != needed[name]
    ]
    if problems:
        raise ValueError(f"the tensors do not fit stack {stack.uid!r}: " + "; ".join(sorted(problems)))


def refuse_bare_training(stack: Stack) -> None:
    """ValueError unless the stack can be trained: its matrices are fp32, or adapters sit on them."""
    if stack.weight_format != "fp32" and not stack.adapters:
        raise ValueError(
            f"stack {stack.uid!r} is stored as {stack.weight_format} and cannot be trained by itself: {WAYS_OUT}"
        )


def stack_bytes(stack: Stack | StackSpec) -> int:
    """Bytes of all tensors of a stack as it is stored. Of a description: without its adapters."""
    if isinstance(stack, StackSpec):
        with torch.device("meta"):
            built = Stack.from_spec(stack, 0)
        shape_stack(built, stack.weight_format)
        stack = built
    return sum(tensor.nbytes for tensor in (*stack.parameters(), *stack.buffers()))
