"""Working buffers on the device, filled ahead of use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stackwise.model.block import Block
from stackwise.trunk.lanes import Lane, Mark
from stackwise.trunk.ledger import Ledger, storage_key
from stackwise.trunk.parking import tensors_of

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes, as PyTorch's own do: products may depend on it in the last bit."""

Live = dict[str, Tensor]
"""Name in the block -> its tensor on the device."""


def packed_bytes(block: Block) -> int:
    """Bytes of a block's tensors side by side."""
    return sum(_rounded(tensor.nbytes) for _, tensor in tensors_of(block))


class Slots:
    """Two buffers, each as large as the largest block: one is in use while the other is being filled.

    Their memory is taken when the first block is copied.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, lane: Lane, ledger: Ledger) -> None:
        self._blocks, self._device, self._lane, self._ledger = list(blocks), device, lane, ledger
        self._slots = [_Slot() for _ in blocks[:2]]
        self._count = 0
        self._known: set[int] = set()

    def start(self, block: Block) -> int:
        """Begin to copy a block's tensors into the buffer that has been idle longest; returns the ticket."""
        slot = min((s for s in self._slots if not s.busy), key=lambda s: s.ticket)
        self._count += 1
        slot.ticket, slot.block = self._count, block
        if id(block) not in self._known:
            self._make_room(block)
        tensors = dict(tensors_of(block))
        slot.live = slot.views(block, tensors)
        slot.loaded = self._lane.run(lambda: _copy(slot.live, tensors), slot.free)
        return slot.ticket

    def _make_room(self, block: Block) -> None:
        """Before the first copy of a block."""
        self._known.add(id(block))
        size = max(packed_bytes(each) for each in [block, *self._blocks])
        for slot in self._slots:
            if size > slot.size:
                self._ledger.add("buffers", size - slot.size)
                slot.allocate(size, self._device, self._lane)

    def owns(self, key: int) -> bool:
        """Whether a storage (`ledger.storage_key`) is that of a buffer."""
        return any(slot.buffer is not None and storage_key(slot.buffer) == key for slot in self._slots)

    def holds(self, ticket: int | None, block: Block) -> bool:
        """Whether a buffer still holds what the ticket stands for."""
        return any(slot.ticket == ticket and slot.block is block for slot in self._slots)

    @property
    def idle(self) -> bool:
        """Whether a buffer may be filled now."""
        return not all(slot.busy for slot in self._slots)

    def open(self, ticket: int) -> Live:
        """The tensors on the device, to be used until `close`."""
        slot = self._slot(ticket)
        self._lane.wait(slot.loaded)
        assert slot.buffer is not None
        slot.busy, slot.version = True, slot.buffer._version
        return slot.live

    def close(self, ticket: int) -> None:
        """The computation given to the device so far is the last to read the buffer. A block that wrote: RuntimeError."""
        slot = self._slot(ticket)
        slot.busy, slot.free = False, self._lane.mark()
        if slot.buffer is not None and slot.buffer._version != slot.version:
            raise RuntimeError(
                f"{type(slot.block).__name__} changes its own tensors while it runs, and a streamed block runs on "
                "copies that are thrown away; keep its stack resident (trunk_residency, training.residency)"
            )

    def abandon(self) -> None:
        """Nothing is in use: a pass that broke off left it."""
        for slot in self._slots:
            slot.busy = False

    def _slot(self, ticket: int) -> _Slot:
        return next(slot for slot in self._slots if slot.ticket == ticket)


class _Slot:
    def __init__(self) -> None:
        self.size = self.ticket = self.version = 0
        self.busy = False
        self.block: Block | None = None
        self.buffer: Tensor | None = None
        self.loaded: Mark = None
        self.free: Mark = None
        self.live: Live = {}

    def allocate(self, size: int, device: torch.device, lane: Lane) -> None:
        with torch.inference_mode(False):
            self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        lane.uses(self.buffer)
        self.size, self.free = size, lane.mark()
        self._views: dict[int, Live] = {}

    def views(self, block: Block, tensors: Live) -> Live:
        """Places in the buffer for a block's tensors, laid out once."""
        made = self._views.get(id(block), {})
        if {n: (t.shape, t.dtype) for n, t in made.items()} == {
            n: (t.shape, t.dtype) for n, t in tensors.items()
        }:
            return made
        assert self.buffer is not None
        views, at = {}, 0
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in tensors.items():
                views[name] = self.buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                at += _rounded(tensor.nbytes)
        self._views[id(block)] = views
        return views


@torch.no_grad()
def _copy(into: Live, tensors: Live) -> None:
    for name, tensor in tensors.items():
        into[name].copy_(tensor.detach(), non_blocking=True)


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
