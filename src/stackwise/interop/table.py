"""The table of a family's tensors: which tensors of the file are which tensors of a rack, and what lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stackwise.interop.changes import Change, Same
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec


@dataclass(frozen=True)
class Row:
    """Tensors of the file, tensors of the rack, and the change between them."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    change: Change


SAME = Same()


def row(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], change: Change | None = None) -> Row:
    """A row of single names or several."""
    return Row(
        (theirs,) if isinstance(theirs, str) else theirs,
        (ours,) if isinstance(ours, str) else ours,
        SAME if change is None else change,
    )


BlockRows = Callable[[BlockSpec], list[Row]]
EndRows = Callable[[RackSpec], list[Row]]


def rows_of(spec: RackSpec, ends: EndRows, block_rows: BlockRows, layer: str) -> Iterator[Row]:
    """All rows of a rack. `layer`: prefix of a layer's tensors in the file, with {} for its number.

    `ends` name whole tensors, `block_rows` what comes behind the layer's prefix and inside its block.
    """
    yield from ends(spec)
    places = [f"stacks.{s.uid}.blocks.{i}." for s in spec.stacks for i in range(len(s.blocks))]
    places += [f"tail.{i}." for i in range(len(spec.tail))]
    for number, (block, place) in enumerate(zip(spec.blocks, places, strict=True)):
        prefix = layer.format(number)
        for entry in block_rows(block):
            theirs = tuple(prefix + name for name in entry.theirs)
            yield Row(theirs, tuple(place + name for name in entry.ours), entry.change)


def file_shapes(rows: list[Row], ours: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the file, from those of a rack, which may be without values."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in rows:
        empty = [torch.empty(ours[name].shape, device="meta") for name in entry.ours]
        for name, tensor in zip(entry.theirs, entry.change.save(empty), strict=True):
            shapes[name] = tuple(tensor.shape)
    return shapes
