"""Names of parameters where adapters sit on a layer.

A layer `q` that carries adapter sets keeps its matrix one module further down, and the sets beside it:

    blocks.0.attn.q.base_layer.weight      blocks.0.attn.q.lora_A.<set>.weight      blocks.0.attn.q.lora_B.<set>.weight

Everybody else sees the *plain* name of the matrix, `blocks.0.attn.q.weight`: `state_dict`, `named_parameters` and
`named_buffers` of racks, stacks and blocks leave `base_layer` out. So checkpoints, optimizer state and growth find a
matrix under one name, whether adapters sit on it or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

_BASE = re.compile(r"(^|\.)base_layer(?=\.|$)")
_SET = re.compile(r"(?:^|\.)lora_\w+\.([^.]+)")


def plain_name(name: str) -> str:
    """The name without `base_layer`."""
    return _BASE.sub("", name).removeprefix(".") if "base_layer" in name else name


def adapter_set_of(name: str) -> str | None:
    """The adapter set that a parameter or module belongs to, from its name `...lora_<tensor>.<set>...`; else None."""
    match = _SET.search(name)
    return match[1] if match else None


def set_modules(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules of one adapter set below `module`, its dropouts included: what to thaw, freeze, train or eval."""
    return [
        child
        for path, child in module.named_modules()
        if path.endswith(f".{name}") and adapter_set_of(path) == name
    ]


class PlainNames(nn.Module):
    """A module whose parameters and buffers go by their plain names."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield plain_name(name), parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in super().named_buffers(prefix, recurse, remove_duplicate):
            yield plain_name(name), buffer
