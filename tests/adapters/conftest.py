"""Small racks and sets that have learned something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stackwise.adapters.attach import adapter_parameters
from stackwise.model.block import Stack
from stackwise.model.block_spec import BlockSpec
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec, StackSpec

BLOCK = BlockSpec(d_model=24, n_heads=4, n_kv_heads=2, d_ff=40)
"""Widths whose products have no common structure: q and o 24 x 24, k and v 12 x 24, gate and up 40 x 24, down 24 x 40."""


@pytest.fixture
def make_rack() -> Callable[..., Rack]:
    """A rack of stacks of one block each, `block` with options of its own."""

    def make(n_stacks: int = 2, seed: int = 0, **options: object) -> Rack:
        block = BlockSpec(**{**BLOCK.__dict__, **options})
        stacks = tuple(StackSpec(f"s{i}", (block,), i) for i in range(n_stacks))
        return Rack(RackSpec(vocab_size=31, d_model=24, stacks=stacks), seed=seed)

    return make


@pytest.fixture
def rack(make_rack: Callable[..., Rack]) -> Rack:
    return make_rack()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 31, (3, 7))


def teach(stack: Stack, name: str | None = None, size: float = 0.3) -> None:
    """Move all tensors of a set away from where they started."""
    with torch.no_grad():
        for path, parameter in adapter_parameters(stack, name).items():
            if "magnitude" in path:
                parameter.mul_(1 + size * torch.rand_like(parameter))
            else:
                parameter.add_(size * torch.randn_like(parameter))
