"""Sets folded into the weights they change.

merge, unmerge          compute with W + sum of the changes for a while; base and sets stay as they are
fold                    W becomes that sum for good, in plain fp32, and the sets are gone
merge_and_requantise    W becomes that sum in the format it has, and the set starts anew (Lialin et al. 2023, ReLoRA,
                        arXiv 2307.05695; over 4 bits Loeschcke et al. 2024, LoQT, arXiv 2405.16528)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stackwise.adapters.attach import adapted_layers, adapter_parameters, checked_names, remove, start_set
from stackwise.model.block import Stack
from stackwise.model.names import adapter_set_of


def merge(stack: Stack, name: str | None = None) -> None:
    """Compute with one matrix per layer that holds the set (null: all of them). A bottleneck set: ValueError.

    Takes the memory of another copy of the weights. Tensors and their names stay the same: what is saved meanwhile is
    the base and the sets. Training the base meanwhile is a RuntimeError.
    """
    names = _foldable(stack, name)
    for _, layer in adapted_layers(stack):
        layer.merge(adapter_names=names)


def unmerge(stack: Stack, name: str | None = None) -> None:
    """Undo `merge` for the set (null: all of them), to the last bit. A set that is not merged is left alone."""
    names = checked_names(stack, name)
    for _, layer in adapted_layers(stack):
        layer.unmerge(names)


@torch.no_grad()
def fold(stack: Stack, name: str | None = None) -> None:
    """Fold a set (null: all) into the weights for good and take it away; the output stays the same to rounding.

    A stack in a frozen format becomes plain fp32, all of it. Layers without a set left are plain linear layers again. A
    bottleneck set, or one part of what a DoRA set goes on scaling: ValueError.
    """
    names = check_fold(stack, name)
    for _, layer in adapted_layers(stack):
        here = [n for n in names if layer.method_of(n) is not None]
        weight = layer.weight_with(here)
        if _is_plain(layer.base_layer):
            layer.base_layer.weight.copy_(weight)  # type: ignore[operator]
        else:
            layer.base_layer = _dense(layer.base_layer, weight)
        layer.unmerge()
    _thaw_the_rest(stack)
    for gone in names:
        remove(stack, gone)


@torch.no_grad()
def merge_and_requantise(stack: Stack, name: str, seed: int = 0, restart: int = 1) -> None:
    """Fold one set into the base, in the format that the base is stored in, and start the set anew.

    `restart`: the how-manieth time, from 1; each draws first values of its own. What the format cannot hold of the
    change is lost. The optimizer's moments of the set are stale afterwards. Errors are those of `fold`.
    """
    names = check_fold(stack, name)
    for _, layer in adapted_layers(stack, name):
        layer.unmerge()
        weight = layer.weight_with(names)
        if _is_plain(layer.base_layer):
            layer.base_layer.weight.copy_(weight)  # type: ignore[operator]
        else:
            layer.base_layer.set_weight(weight)  # type: ignore[operator]
    start_set(stack, name, seed, restart=restart)


@torch.no_grad()
def folded_weights(stack: Stack) -> dict[str, Tensor]:
    """Weights in fp32 as `fold` would leave them, bottlenecks left out: plain name -> new tensor, adapted layers only."""
    return {
        f"{path}.weight": layer.weight_with(
            [n for n in layer.active_adapters if layer.method_of(n) != "bottleneck"]
        )
        for path, layer in adapted_layers(stack)
    }


def check_fold(stack: Stack, name: str | None = None) -> list[str]:
    """The names of the sets that `fold` would fold; what it would refuse is a ValueError."""
    names = _foldable(stack, name)
    _leave_no_dora(stack, names)
    return names


def _foldable(stack: Stack, name: str | None) -> list[str]:
    """The sets to fold, checked before anything changes."""
    names = checked_names(stack, name)
    for spec in stack.adapters:
        if spec.name in names and spec.method == "bottleneck":
            raise ValueError(
                f"the set {spec.name!r} of stack {stack.uid!r} is a bottleneck, which is not linear and cannot be folded "
                "into a weight; keep it attached, or use lora, dora or mora"
            )
    broken = [
        path
        for path, parameter in adapter_parameters(stack).items()
        if adapter_set_of(path) in names and not parameter.is_meta and not torch.isfinite(parameter).all()
    ]
    if broken:
        raise ValueError(f"{', '.join(broken[:3])} of stack {stack.uid!r} hold numbers that are not finite")
    return names


def _leave_no_dora(stack: Stack, names: list[str]) -> None:
    """A DoRA set scales the rows of the base it sits on: another base under it would be another function."""
    left = [spec.name for spec in stack.adapters if spec.method == "dora" and spec.name not in names]
    if left:
        raise ValueError(
            f"the DoRA set {left[0]!r} of stack {stack.uid!r} depends on the weight that {', '.join(names)} would "
            "change; fold all sets at once, or the DoRA set first"
        )


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "_parameters", {}).get("weight"), nn.Parameter)


def _dense(frozen: nn.Module, weight: Tensor | None = None) -> nn.Module:
    """The layer of a frozen format as a plain fp32 layer, frozen."""
    dense: nn.Module = frozen.dense(weight)  # type: ignore[operator]
    dense.weight.requires_grad_(False)
    return dense


def _thaw_the_rest(stack: Stack) -> None:
    """One format per stack: layers without the set follow those that had it."""
    if stack.weight_format == "fp32":
        return
    for module in list(stack.modules()):
        for leaf, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not _is_plain(child):
                setattr(module, leaf, _dense(child))
    stack.weight_format = "fp32"
