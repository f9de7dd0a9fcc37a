"""Where the blocks of a rack live while a stage trains, and the runner that goes with it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stackwise.model.block import Block
from stackwise.model.names import adapter_set_of
from stackwise.model.rack import Rack, recompute_block, run_block
from stackwise.storage import ops
from stackwise.trunk.lanes import lane_to
from stackwise.trunk.parking import WAYS_OUT, park, parked_blocks, unpark
from stackwise.trunk.streaming import Streamer

_scratch: dict[Path, TemporaryDirectory[str]] = {}

FROZEN = ("resident", "streamed", "mapped")
TRAINED = ("resident", "streamed")


def reside(
    rack: Rack,
    device: torch.device,
    *,
    frozen: str = "resident",
    trained: str = "resident",
    recompute: bool = False,
    folder: Path | None = None,
) -> None:
    """Move a rack so that `device` holds what the stage wants there, and install its runner.

    resident: on the device. streamed: in host memory, a block at a time is copied to the device. mapped: the same
    from files in `folder`, where they stay as long as the process. `trained` is for blocks of which more than adapters trains, `frozen` for the others.
    Embedding, norms and head are always on the device. `recompute`: resident blocks keep only their inputs for the
    backward pass; streamed ones always do. To be called once it is known what trains, before optimizers are made.
    """
    for value, known in ((frozen, FROZEN), (trained, TRAINED)):
        if value not in known:
            raise ValueError(f"residency must be one of {', '.join(known)}, got {value!r}")
    if frozen == "mapped" and folder is None:
        raise ValueError("mapped blocks need a folder for their files")
    pinned = lane_to(device).pins
    named = [(f"{s.uid}.{i}", block) for s in rack.stacks for i, block in enumerate(s.blocks)]
    named += [(f"tail.{i}", block) for i, block in enumerate(rack.tail)]
    for name, block in named:
        assert isinstance(block, Block)
        where = trained if trains(block) else frozen
        if where == "resident":
            unpark(block, device)
        elif where == "streamed":
            park(block, pinned=pinned)
        else:
            assert folder is not None
            park(block, pinned=pinned, file=scratch(folder) / f"{name}.safetensors")
    own = (stack.io for stack in rack.stacks)
    for child in (rack.embedding, rack.positions, rack.time, rack.norm, rack.head, *own):
        if child is not None:
            child.to(device)
    rest = recompute_block if recompute else run_block
    rack.runner = Streamer(rack.blocks(), device, rest=rest) if parked_blocks(rack.blocks()) else rest


def trains(block: Block) -> bool:
    """Whether more of a block trains than adapters on it."""
    return any(p.requires_grad and adapter_set_of(name) is None for name, p in block.named_parameters())


def scratch(base: Path) -> Path:
    """A folder in `base` that lasts as long as this process."""
    held = _scratch.get(base)
    if held is None or not Path(held.name).is_dir():
        try:
            ops.make_dir(base)
            held = TemporaryDirectory(prefix="weights-", dir=base, ignore_cleanup_errors=True)
        except OSError as error:
            raise OSError(f"cannot keep frozen weights in {base}: {error}; {WAYS_OUT}") from error
        _scratch[base] = held
    return Path(held.name)
