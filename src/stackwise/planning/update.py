"""What the optimizer's step takes for a moment, on top of weights, gradients and moments.

Muon works on stacks of matrices of one shape, 8-bit Adam on a tensor in pieces; the others go tensor by tensor, in
place. Where each tensor steps within the backward pass, it takes its share there (`trace`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stackwise.planning.fake import fake_tensors
from stackwise.planning.live import LiveBytes
from stackwise.training.adam8bit import working_bytes
from stackwise.training.muon import BATCH_NUMBERS, Muon
from stackwise.training.optim_rules import kind_of, memory_of
from stackwise.training.rounding import Rounding
from stackwise.training.settings import OptimizerSettings


class Update(NamedTuple):
    """Tensors that step alike: by `optimizer`, kept as `memory` says (`optim_rules.Rule`), of one shape."""

    optimizer: str
    memory: str
    shape: tuple[int, ...]


def update_of(name: str, tensor: Tensor, settings: OptimizerSettings) -> Update:
    """How one trained parameter of a rack steps."""
    kind, memory = kind_of(name, tensor, settings.optimizer_type), memory_of(name, tensor, settings.memory)
    return Update(kind, memory, tuple(tensor.shape))


def update_bytes(updates: Mapping[Update, int], settings: OptimizerSettings, device: str) -> int:
    """The most that the step over so many tensors of each sort takes at once on a kind of device."""
    return max((one_update(update, count, settings, device) for update, count in updates.items()), default=0)


def one_update(update: Update, count: int, settings: OptimizerSettings, device: str) -> int:
    """The most that the step over `count` tensors of one sort takes at once."""
    numbers = prod(update.shape)
    if update.optimizer == "Muon":
        return _muon(update, min(count, max(1, BATCH_NUMBERS // numbers)), device)
    if update.memory == "full":
        return 0
    dtype = torch.bfloat16 if update.memory == "int8_nomaster" else torch.float32
    coupled = update.optimizer == "Adam" and settings.weight_decay > 0
    return working_bytes(numbers, dtype, device, coupled=coupled)


@lru_cache(maxsize=256)
def _muon(update: Update, count: int, device: str) -> int:
    """Matrices of one shape that go through the iteration together. In eight bits their momenta come and go as well."""
    dtype = torch.bfloat16 if update.memory == "int8_nomaster" else torch.float32
    with fake_tensors(device):
        matrices = [nn.Parameter(torch.empty(update.shape, dtype=dtype)) for _ in range(count)]
        for matrix in matrices:
            matrix.grad = torch.empty(update.shape, dtype=dtype)
        names: dict[Tensor, str] = {matrix: str(i) for i, matrix in enumerate(matrices)}
        optimizer = Muon(matrices, rounding=Rounding(names, 0))
        optimizer.step()
        held = [t for m in matrices for t in (m, m.grad, *optimizer.state[m].values())]
        with LiveBytes(held) as live:
            optimizer.step()
    momenta = 0 if update.memory == "full" else 4 * count * prod(update.shape)
    return live.peak + momenta
