"""Blocks whose tensors are kept off the compute device: in host memory, or in a file mapped into memory.

The tensors of a parked block are still those of the module, so names, saving, loading and optimizers do not change.
To run it they are copied to the device (`trunk.streaming`). On a machine whose only device is the CPU both sides are
the same memory, and `Block.parked` alone tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from stackwise.model.block import Block
from stackwise.model.files import open_tensors
from stackwise.storage import ops
from stackwise.storage.errors import DamagedFileError
from stackwise.storage.tensors import encode

WAYS_OUT = (
    "choose another training.progressive.cache_dir, or set training.progressive.trunk_residency to streamed, which "
    "keeps them in host memory"
)


@dataclass(frozen=True)
class Parked:
    """Where a block is kept: in host memory, but for the tensors mapped from `file` (name -> address)."""

    file: Path | None = None
    mapped: dict[str, int] = field(default_factory=dict)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the path that leads to them, which is what `functional_call` takes."""
    for path, child in module.named_modules():
        for held in (child._parameters, child._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield (f"{path}.{name}" if path else name), tensor


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each storage once."""
    sizes = {id(t): t.nbytes for _, t in tensors_of(module)}
    return sum(sizes.values())


def parked_blocks(blocks: Iterable[Block]) -> list[Block]:
    return [block for block in blocks if block.parked is not None]


@torch.no_grad()
def park(block: Block, *, pinned: bool = False, file: Path | None = None) -> None:
    """Move a block's tensors to host memory (page-locked when `pinned`).

    With `file` those that do not train go into that safetensors file, which is written anew unless this process has
    written the same there, and is read-only from then on. They are mapped into memory: what is not in use takes none.
    """
    old = block.parked if isinstance(block.parked, Parked) else Parked()
    mapped: dict[str, Tensor] = {}
    if file is not None:
        frozen = {name: t.detach() for name, t in tensors_of(block) if not t.requires_grad}
        same = old.file == file and old.mapped == {name: t.data_ptr() for name, t in frozen.items()}
        mapped = frozen if same else _map(file, frozen)
    known = set(old.mapped.values())

    def move(name: str, tensor: Tensor) -> Tensor:
        if name in mapped:
            return mapped[name]
        tensor = tensor.to("cpu", copy=tensor.data_ptr() in known).contiguous()
        return tensor.pin_memory() if pinned and not tensor.is_pinned() else tensor

    _replace(block, move)
    block.parked = Parked(file, {name: t.data_ptr() for name, t in mapped.items()})


@torch.no_grad()
def unpark(block: Block, device: torch.device) -> None:
    """Move a block's tensors to the device for good. A file that held them stays."""
    known = set(block.parked.mapped.values()) if isinstance(block.parked, Parked) else set()
    _replace(block, lambda name, tensor: tensor.to(device, copy=tensor.data_ptr() in known))
    block.parked = None


def _replace(block: nn.Module, move: Callable[[str, Tensor], Tensor]) -> None:
    """Put other memory behind every tensor of a block, gradients included; parameters stay the same objects."""
    for path, module in block.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                full = f"{path}.{name}" if path else name
                if isinstance(tensor, nn.Parameter):
                    tensor.data = move(full, tensor.data)
                    if tensor.grad is not None:
                        tensor.grad = tensor.grad.to(tensor.device)
                elif tensor is not None:
                    held[name] = move(full, tensor)


def _map(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write tensors to a file and map it. Writing into them would not reach the file."""
    from safetensors import SafetensorError

    try:
        ops.make_dir(file.parent)
        # What was mapped from an old file of this name stays what it was.
        ops.write_atomic(file, encode(tensors).chunks, kind="text", mode=0o444)
        with open_tensors(file) as opened:
            return {name: opened.get_tensor(name) for name in tensors}
    except (OSError, SafetensorError, DamagedFileError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(
            f"cannot keep {size:,} bytes of frozen weights in {file}: {error}; make room, or {WAYS_OUT}"
        ) from error
