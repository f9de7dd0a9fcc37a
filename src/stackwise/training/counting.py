"""Counted bytes: what a training step really holds, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SavedBytes:
    """Bytes that autograd keeps between forward and backward: each storage once, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self._skip = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._seen: dict[int, int] = {}
        self._alive: list[Tensor] = []  # a freed storage's address may come back and would then be missed

    @property
    def total(self) -> int:
        return sum(self._seen.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._skip and storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor

    @contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        """Count what the forward pass inside the block saves."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield self
        self._alive.clear()


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, each tensor once."""
    return sum(p.nbytes for p in model.parameters())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients held now."""
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
