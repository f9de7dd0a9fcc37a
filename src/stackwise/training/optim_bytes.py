"""Bytes that training a parameter takes, without training it; for plans over modules that hold no numbers.

Per number of a large matrix, under AdamW, in weights + gradients + moments:

    full            4 + 4 + 8     fp32 throughout
    int8            4 + 4 + 2     8-bit moments
    int8_nomaster   2 + 2 + 2     bf16 weights and gradients, no master
    fused           2 + 0 + 2     the same; of the gradients only the largest is ever alive

8-bit moments take 4 bytes more per block of 256 and moment, and optimizers 4 for a step counter where they have one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from stackwise.training.eightbit import scale_count
from stackwise.training.optim_kinds import make_optimizer
from stackwise.training.optim_rules import kind_of, memory_of
from stackwise.training.settings import OptimizerSettings

MOMENTS = {"AdamW": 2, "Adam": 2, "Muon": 1}
"""Moments of the optimizers that can keep them in eight bits."""

_PROBE = (5, 7, 11, 13, 17)  # unlike each other and unlike any size an optimizer would choose by itself


class Bytes(NamedTuple):
    """Of one trained parameter. `counters` are the moments' step counters, which never leave their place."""

    weights: int
    gradients: int
    moments: int
    counters: int


def state_bytes(kind: str, memory: str, shape: tuple[int, ...], opt: OptimizerSettings) -> tuple[int, int]:
    """Bytes of the moments that the optimizer `kind` keeps of one parameter, and of its counters.

    `memory`: full, int8 or int8_nomaster. In full they are those of an optimizer that steps a small parameter, each
    dimension of its state scaled to the size it follows.
    """
    numbers = torch.Size(shape).numel()
    if memory != "full":
        return MOMENTS[kind] * (numbers + 4 * scale_count(numbers)), 0 if kind == "Muon" else 4
    sizes = dict(zip(_PROBE, shape, strict=False))
    own = opt if kind == opt.optimizer_type else opt.model_copy(update={"custom_params": {}})
    moments = counters = 0
    for held, width in _probe(kind, len(shape), own.model_dump_json()):
        moments += torch.Size([sizes.get(size, size) for size in held]).numel() * width if held else 0
        counters += 0 if held else width
    return moments, counters


@lru_cache(maxsize=64)
def _probe(kind: str, dimensions: int, settings: str) -> list[tuple[tuple[int, ...], int]]:
    """Shapes and bytes per number of the state that a small parameter has after a step."""
    opt = OptimizerSettings.model_validate_json(settings)
    parameter = nn.Parameter(torch.ones(_PROBE[:dimensions], device="cpu"))
    parameter.grad = torch.ones_like(parameter)
    group = {"params": [parameter], "lr": opt.lr, "weight_decay": opt.weight_decay}
    optimizer = make_optimizer(kind, "full", [group], opt)
    optimizer.step()
    held = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return [(tuple(value.shape), value.element_size()) for value in held]


def parameter_bytes(name: str, parameter: torch.Tensor, opt: OptimizerSettings) -> Bytes:
    """What one trained parameter takes under `training.optimizer`; gradients as if all were alive at once."""
    memory, kind = memory_of(name, parameter, opt.memory), kind_of(name, parameter, opt.optimizer_type)
    width = 2 if memory == "int8_nomaster" else 4
    held = parameter.numel() * width
    return Bytes(held, held, *state_bytes(kind, memory, tuple(parameter.shape), opt))
