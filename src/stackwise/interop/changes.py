"""How tensors differ between a file and a rack. Every change is a reordering of numbers, undone to the last bit.

`load` takes the tensors of the file and gives those of the rack, `save` the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """Both directions of one row of a table."""

    def load(self, theirs: list[Tensor]) -> list[Tensor]: ...
    def save(self, ours: list[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Same:
    """As it is."""

    def load(self, theirs: list[Tensor]) -> list[Tensor]:
        return theirs

    def save(self, ours: list[Tensor]) -> list[Tensor]:
        return ours


@dataclass(frozen=True)
class Transposed:
    """Matrices stored [in, out]; vectors are left as they are."""

    def load(self, theirs: list[Tensor]) -> list[Tensor]:
        return [tensor.t() for tensor in theirs]

    def save(self, ours: list[Tensor]) -> list[Tensor]:
        return [tensor.t() for tensor in ours]


@dataclass(frozen=True)
class Joined:
    """One tensor of the file holds several of the rack, one after another along the first dimension."""

    sizes: tuple[int, ...]

    def load(self, theirs: list[Tensor]) -> list[Tensor]:
        return list(theirs[0].split(self.sizes))

    def save(self, ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat(ours)]


@dataclass(frozen=True)
class Halves:
    """Rotary pairs (i, i + H/2) of every head in the file, (2i, 2i + 1) in the rack: rows change places.

    The first dimension is made of heads, `head_dim` rows each.
    """

    head_dim: int

    def load(self, theirs: list[Tensor]) -> list[Tensor]:
        return [self._moved(tensor, (2, -1)) for tensor in theirs]

    def save(self, ours: list[Tensor]) -> list[Tensor]:
        return [self._moved(tensor, (-1, 2)) for tensor in ours]

    def _moved(self, tensor: Tensor, pairs: tuple[int, int]) -> Tensor:
        heads = tensor.unflatten(0, (-1, self.head_dim))
        return heads.unflatten(1, pairs).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Each:
    """A change of its own for every tensor."""

    parts: tuple[Change, ...]

    def load(self, theirs: list[Tensor]) -> list[Tensor]:
        return [part.load([tensor])[0] for part, tensor in zip(self.parts, theirs, strict=True)]

    def save(self, ours: list[Tensor]) -> list[Tensor]:
        return [part.save([tensor])[0] for part, tensor in zip(self.parts, ours, strict=True)]


@dataclass(frozen=True)
class Chain:
    """One change after another, in the direction of loading."""

    steps: tuple[Change, ...]

    def load(self, theirs: list[Tensor]) -> list[Tensor]:
        for step in self.steps:
            theirs = step.load(theirs)
        return theirs

    def save(self, ours: list[Tensor]) -> list[Tensor]:
        for step in reversed(self.steps):
            ours = step.save(ours)
        return ours
