"""What a weight format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, dtype) of each tensor that stores a matrix."""

TINY = 2.0**-126
"""The smallest normal fp32 number: a scale of zero would divide by zero."""


def holds_values(tensor: Tensor) -> bool:
    """False for tensors that only have a shape."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


class Format(ABC):
    """One way of storing a matrix."""

    name: str
    bits: float
    """Bits per weight of a large matrix; `bytes` is exact for any."""

    @abstractmethod
    def layout(self, shape: Sequence[int]) -> Layout:
        """The tensors that store a matrix [O, I]."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Finite fp32 values -> the tensors of `layout`."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensors of `layout` -> values. Products are formed in fp32 and rounded to `dtype` once."""

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        """weight [O, I] in any float dtype -> named tensors. Numbers that are not finite: ValueError."""
        if not holds_values(weight):
            return self.empty(weight.shape, weight.device)
        if not torch.isfinite(weight).all():
            raise ValueError(f"the matrix to be stored as {self.name} holds numbers that are not finite")
        return self.pack(weight.detach().float())

    @torch.no_grad()
    def dequantise(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Named tensors -> the matrix of `shape`. Where nothing is to be converted it is the stored one itself."""
        stored = next(iter(tensors.values()))
        if not holds_values(stored):
            return torch.empty(tuple(shape), dtype=dtype, device=stored.device)
        return self.unpack(tensors, shape, dtype)

    def empty(self, shape: Sequence[int], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The tensors of a matrix, without values."""
        return {n: torch.empty(s, dtype=d, device=device) for n, (s, d) in self.layout(shape).items()}

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of all tensors that store a matrix of `shape`, exactly."""
        return sum(prod(s) * dtype.itemsize for s, dtype in self.layout(shape).values())

    def round(self, weight: Tensor) -> Tensor:
        """The values that would remain if `weight` were stored, in its own dtype."""
        return self.dequantise(self.quantise(weight), weight.shape, weight.dtype)
