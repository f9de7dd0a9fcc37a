"""Named sets of adapters on a stack: attach, look up, remove.

    y = W x + sum over sets of (alpha / r) B A dropout(x)        alpha / sqrt(r) with rslora

Hu et al. 2021 (arXiv 2106.09685), Kalajdzievski 2023 (rslora, 2312.03732), Liu et al. 2024 (DoRA, 2402.09353); MoRA and
bottlenecks have files of their own. A set changes nothing when it is attached: B, M and the bottleneck's `up` are zero.
A is drawn from a generator keyed by the seed and its parameter's name, so neither the order in which things are built
nor the global generators matter. Sets compute and train in fp32.

Layers and sets are PEFT's. Its function `inject_adapter_in_model` is not used: it unpacks each 4-bit matrix 22 times
where 0 will do (3.5 s of CPU for one 8192 x 28672 matrix), freezes everything else, draws from the global generator,
and turns each set's gradients on or off when another one comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stackwise.adapters.package import adapted_linear
from stackwise.adapters.targets import targeted_paths
from stackwise.model.block import Stack
from stackwise.model.init import keyed_generator
from stackwise.model.names import adapter_set_of, set_modules
from stackwise.model.spec import AdapterSpec

if TYPE_CHECKING:
    from stackwise.adapters.layer import AdaptedLinear, SetConfig


def attach(stack: Stack, spec: AdapterSpec, seed: int = 0, prefix: str | None = None) -> None:
    """Add a named set to the targeted layers of a stack; the output stays what it was, to the last bit (DoRA: 1e-6).

    `prefix`: the stack's own name inside its rack, `stacks.<uid>.`; it takes part in the key of the first values. The
    set trains, what trained before goes on training. A name that is taken, or a target that matches nothing: ValueError.
    """
    if any(held.name == spec.name for held in stack.adapters):
        raise ValueError(
            f"stack {stack.uid!r} has an adapter set {spec.name!r} already; fold it in with merge_lora, or remove it, "
            "before you add another of this name"
        )
    if hasattr(nn.ModuleDict, spec.name):
        raise ValueError(
            f"an adapter set cannot be called {spec.name!r}, a word that PyTorch's containers use"
        )
    paths = targeted_paths(stack, spec)
    adapted, config = adapted_linear(), set_config(spec)
    options: dict[str, Any] = {"r": spec.rank, "lora_alpha": spec.alpha, "config": config}
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        parent = stack.get_submodule(owner)
        layer = getattr(parent, leaf)
        on_meta = next(iter([*layer.parameters(), *layer.buffers()])).is_meta
        # PEFT draws first values of its own from the global generator
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
            if isinstance(layer, adapted):
                layer.update_layer(spec.name, **options)
            else:
                layer = adapted(layer, spec.name, **options).train(layer.training)
                setattr(parent, leaf, layer)
        layer.set_adapter([*dict.fromkeys([*layer.active_adapters, spec.name])])
    for module in set_modules(stack, spec.name):
        module.train(stack.training)
    start_set(stack, spec.name, seed, prefix)
    stack.adapters = (*stack.adapters, spec)


def set_config(spec: AdapterSpec) -> SetConfig:
    """PEFT's configuration of a set; where it sits is left out."""
    adapted_linear()
    from stackwise.adapters.layer import SetConfig

    return SetConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides by r, any number will do
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.method == "dora",
        method=spec.method,
    )


@torch.no_grad()
def start_set(stack: Stack, name: str, seed: int, prefix: str | None = None, restart: int = 0) -> None:
    """Give a set its first values. `restart` > 0 draws others: how often the set has been folded in before.

    A and the bottleneck's `down` are U(-1/sqrt(k), 1/sqrt(k)) for k inputs (Kaiming, as in PEFT), everything else is
    zero; DoRA's magnitudes are the norms of the rows as they are.
    """
    prefix = f"stacks.{stack.uid}." if prefix is None else prefix
    for path, parameter in adapter_parameters(stack, name).items():
        if not _holds_values(parameter):
            continue
        if ".lora_A." in path or path.endswith(".down.weight"):
            key = (f"{prefix}{path}", restart) if restart else (f"{prefix}{path}",)
            bound = parameter.shape[-1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(
                -bound, bound, generator=keyed_generator(seed, *key)
            )
            parameter.copy_(values)
        elif ".lora_magnitude_vector." in path:
            layer = stack.get_submodule(path.partition(".lora_magnitude_vector.")[0])
            parameter.copy_(layer.base_weight().norm(dim=1))  # type: ignore[operator]
        else:
            parameter.zero_()


def adapter_parameters(stack: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Parameters of one set, or of all sets, by name."""
    return {
        path: parameter
        for path, parameter in stack.named_parameters()
        if (held := adapter_set_of(path)) is not None and name in (None, held)
    }


def adapted_layers(stack: Stack, name: str | None = None) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers, with their paths, that carry a set of this name, or any set."""
    if stack.adapters:
        adapted = adapted_linear()
        for path, module in stack.named_modules():
            if isinstance(module, adapted) and (name is None or module.method_of(name) is not None):
                yield path, module


def sets(stack: Stack) -> dict[str, dict[str, Any]]:
    """What sits on the stack: set -> {method, rank, alpha, parameters}, in the order of attaching."""
    counts: dict[str, int] = {}
    for path, parameter in stack.named_parameters():
        if (name := adapter_set_of(path)) is not None:
            counts[name] = counts.get(name, 0) + parameter.numel()
    return {
        spec.name: {
            "method": spec.method,
            "rank": spec.rank,
            "alpha": spec.alpha,
            "parameters": counts.get(spec.name, 0),
        }
        for spec in stack.adapters
    }


def checked_names(stack: Stack, name: str | None) -> list[str]:
    """The named set, or all of them. A set that the stack lacks: ValueError with those it has."""
    held = [spec.name for spec in stack.adapters]
    if name is None:
        return held
    if name not in held:
        raise ValueError(
            f"stack {stack.uid!r} has no adapter set {name!r}; it has {', '.join(held) if held else 'none'}"
        )
    return [name]


def remove(stack: Stack, name: str | None = None) -> None:
    """Take a set (null: all) away with what it learned. Layers without a set left are plain again."""
    for gone in checked_names(stack, name):
        for path, layer in list(adapted_layers(stack, gone)):
            layer.unmerge([gone])
            left = [n for n in layer.active_adapters if n != gone]
            if left:
                layer.delete_adapter(gone)
            else:
                owner, _, leaf = path.rpartition(".")
                setattr(stack.get_submodule(owner), leaf, layer.base_layer.train(layer.training))
        stack.adapters = tuple(spec for spec in stack.adapters if spec.name != gone)


def _holds_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
