"""Which layers of a stack a set sits on."""

from __future__ import annotations

import re

from torch import nn

from stackwise.config.errors import did_you_mean
from stackwise.model.block import Block, Stack
from stackwise.model.names import adapter_set_of, plain_name
from stackwise.model.spec import AdapterSpec

ALL = "all-linear"


def linear_paths(stack: Stack) -> list[str]:
    """Plain paths of every linear layer of the blocks, in forward order: blocks.0.attn.q, ..."""
    return [
        plain_name(path)
        for path, module in stack.named_modules()
        if isinstance(module, nn.Linear) and adapter_set_of(path) is None
    ]


def targeted_paths(stack: Stack, spec: AdapterSpec) -> list[str]:
    """The layers that `spec.targets` names, in forward order.

    all-linear is every linear layer; for a bottleneck, which sits behind a sub-layer, every output projection. Any
    other target is the end of a path (q, attn.q) or a regular expression for whole paths. One that matches nothing:
    ValueError with the layers there are.
    """
    paths = linear_paths(stack)
    chosen: set[str] = set()
    for target in spec.targets:
        found = set(_outputs(stack) if spec.method == "bottleneck" else paths) if target == ALL else set()
        found |= {
            path for path in paths if f".{path}".endswith(f".{target}") or _pattern(target).fullmatch(path)
        }
        if not found:
            leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            close = did_you_mean(target, [ALL, *leaves])
            raise ValueError(
                f"the adapter target {target!r} matches no linear layer of stack {stack.uid!r}; known: {ALL}, "
                f"{', '.join(leaves)}, paths such as {paths[0]}, or a regular expression for whole paths"
                + (f"; {close}" if close else "")
            )
        chosen |= found
    return [path for path in paths if path in chosen]


def _outputs(stack: Stack) -> list[str]:
    outputs = {
        id(layer)
        for block in stack.blocks
        if isinstance(block, Block)
        for layer in block.output_projections()
    }
    return [path for path, module in stack.named_modules() if id(module) in outputs]


def _pattern(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target)
    except re.error as error:
        raise ValueError(f"the adapter target {target!r} is no regular expression: {error}") from None
