"""What a stage holds all the time: weights, gradients and moments, exactly, by part of the rack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stackwise.curriculum.assemble import build_rack
from stackwise.curriculum.split import apply_training
from stackwise.model.names import PlainNames, adapter_set_of
from stackwise.planning.situation import Situation, shortened
from stackwise.planning.update import Update, update_of
from stackwise.precision.frozen_linear import FrozenLinear
from stackwise.training.optim_bytes import parameter_bytes
from stackwise.training.optim_rules import memory_of, own_name
from stackwise.trunk.legality import cache_refusal
from stackwise.trunk.residency import trains

if TYPE_CHECKING:
    from stackwise.model.rack import Rack

PARTS = ("blocks", "adapters", "embedding", "head")
"""Norms count with the blocks, learned positions and the time input with the embedding. A tied head has nothing of its own."""

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Part:
    """Numbers and bytes of a part. `weights` by format; `moments` of which `counters` are the step counters."""

    parameters: int = 0
    trainable: int = 0
    weights: Counter[str] = field(default_factory=Counter)
    gradients: int = 0
    moments: int = 0
    counters: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())


@dataclass
class Held:
    """All parts of a rack in a stage: those whose home is the device, and those parked in host memory.

    `updates`: how many tensors train on the device, by how they step; `parked_trained`: bytes of parked weights
    that train. `prefix_blocks` run without gradient; `refusal`: why their outputs may not be stored, null where they may.
    `largest_gradient`, `largest_moments`: of a single tensor on the device.
    """

    device: dict[str, Part]
    host: dict[str, Part]
    prefix_blocks: int = 0
    refusal: str | None = None
    largest_gradient: int = 0
    largest_moments: int = 0
    updates: Counter[Update] = field(default_factory=Counter)
    parked_trained: int = 0

    def total(self, item: str, *, host: bool = False) -> int:
        """weight_bytes, gradients, moments, counters, parameters or trainable over all parts of a side."""
        return sum(getattr(part, item) for part in (self.host if host else self.device).values())

    def both(self, item: str) -> int:
        """The same over both sides."""
        return self.total(item) + self.total(item, host=True)

    def weights(self, *, host: bool = False) -> dict[str, int]:
        """Bytes of the weights of a side by format."""
        total: Counter[str] = Counter()
        for part in (self.host if host else self.device).values():
            total.update(part.weights)
        return dict(sorted(total.items()))


@lru_cache(maxsize=256)
def held(situation: Situation) -> Held:
    """Count a stage on modules without storage; of a run of equal blocks only some are built."""
    small, counts = shortened(situation)
    optimizer = situation.settings
    with torch.device("meta"):
        rack = build_rack(small.spec)
    split = apply_training(rack, small.units, small.alone)
    found = Held({name: Part() for name in PARTS}, {name: Part() for name in PARTS})
    found.prefix_blocks = sum(counts[: split.prefix_blocks])
    found.refusal = cache_refusal(rack, split.prefix)
    for name, tensor, numbers, place in _tensors(rack, situation, counts):
        part = (found.host if place.parked else found.device)[part_of(name)]
        part.parameters += numbers * place.copies
        if not tensor.requires_grad:
            part.weights[place.stored] += tensor.nbytes * place.copies
            continue
        size = parameter_bytes(name, tensor, optimizer)
        small_numbers = memory_of(name, tensor, optimizer.memory) == "int8_nomaster"
        part.trainable += numbers * place.copies
        part.weights["bf16" if small_numbers else place.stored] += size.weights * place.copies
        part.gradients += size.gradients * place.copies
        part.moments += (size.moments + size.counters) * place.copies
        part.counters += size.counters * place.copies
        if place.parked:
            found.parked_trained += size.weights * place.copies
        else:
            found.updates[update_of(name, tensor, optimizer)] += place.copies
            found.largest_gradient = max(found.largest_gradient, size.gradients)
            found.largest_moments = max(found.largest_moments, size.moments)
    return found


def part_of(name: str) -> str:
    """The part that a tensor of a rack belongs to, by its name."""
    if adapter_set_of(name) is not None:
        return "adapters"
    first = own_name(name).partition(".")[0]
    return {"embedding": "embedding", "positions": "embedding", "time": "embedding", "head": "head"}.get(
        first, "blocks"
    )


class _Place(NamedTuple):
    """How many tensors one stands for, how it is stored, whether its home is the host."""

    copies: int
    stored: str
    parked: bool


def _tensors(
    rack: Rack, situation: Situation, counts: list[int]
) -> Iterator[tuple[str, Tensor, int, _Place]]:
    """(name, tensor, numbers it stores, place) of all parameters and buffers, each once."""
    names = [f"stacks.{s.uid}.blocks.{i}." for s in rack.stacks for i in range(len(s.blocks))]
    names += [f"tail.{i}." for i in range(len(rack.tail))]
    formats = [s.weight_format for s in rack.stacks for _ in s.blocks] + ["fp32"] * len(rack.tail)
    seen = set()
    for prefix, block, count, packed in zip(names, rack.blocks(), counts, formats, strict=True):
        where = situation.trained if trains(block) else situation.frozen
        for name, tensor, numbers, is_packed in _of(block, prefix):
            seen.add(name)
            stored = packed if is_packed else _NAMES[tensor.dtype]
            yield name, tensor, numbers, _Place(count, stored, where != "resident")
    for name, tensor, numbers, _ in _of(rack, ""):
        if name not in seen:
            yield name, tensor, numbers, _Place(1, _NAMES[tensor.dtype], False)


def _of(module: PlainNames, prefix: str) -> Iterator[tuple[str, Tensor, int, bool]]:
    """(name, tensor, numbers, whether it is a piece of a packed matrix) of everything below a module.

    The numbers of a packed matrix are counted with the first of its tensors.
    """
    first: dict[int, int] = {}
    for child in module.modules():
        if isinstance(child, FrozenLinear):
            packed = list(child.packed().values())
            first |= {id(packed[0]): prod(child.shape), **{id(t): 0 for t in packed[1:]}}
    for name, tensor in (
        *module.named_parameters(prefix.rstrip(".")),
        *module.named_buffers(prefix.rstrip(".")),
    ):
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        yield name, tensor, first.get(id(tensor), tensor.numel() if is_parameter else 0), id(tensor) in first
