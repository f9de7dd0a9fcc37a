"""What stored activations are a function of: every tensor and option of the prefix, and the data they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from stackwise.model.rack import Rack

IDENTITY = ("tokenizer", "data", "rows", "corruption", "compute")
"""What a key says besides the prefix: hashes of tokenizer and data, how rows are cut from it, corruption and its seed, and the dtype and device of the computation."""


def prefix_hash(rack: Rack, prefix: int) -> str:
    """Hash of the first `prefix` units (the embedding, then blocks): tensors, formats and options."""
    return prefix_hashes(rack, max(0, prefix - 1))[-1]


def prefix_hashes(rack: Rack, n_blocks: int) -> list[str]:
    """Hash of the embedding alone, then with 1, 2, ... `n_blocks` blocks.

    SHA-256 over names, dtypes, shapes and bytes; about a second per GB, once per stage.
    """
    spec = rack.spec
    running = hashlib.sha256()
    facts = {
        name: getattr(spec, name)
        for name in ("vocab_size", "d_model", "positions", "norm_eps", "embedding_norm", "embedding_scale")
    }
    if spec.time is not None:
        facts["time"] = asdict(spec.time)
    _add(running, facts, (m for m in (rack.embedding, rack.positions, rack.time) if m is not None))
    hashes = [running.hexdigest()]
    stacks: list[dict[str, Any]] = []
    for stack in rack.stacks:
        facts = {"format": stack.spec.weight_format, "compute": stack.spec.compute_dtype}
        adapters = [asdict(adapter) for adapter in stack.spec.adapters]
        stacks += [{**facts, "adapters": adapters}] * len(stack.blocks)
    stacks += [{}] * len(rack.tail)
    for facts, block in list(zip(stacks, rack.blocks(), strict=True))[:n_blocks]:
        _add(running, {**facts, **asdict(block.spec)}, [block])
        hashes.append(running.hexdigest())
    return hashes


def store_key(prefix: str, boundary: int, identity: Mapping[str, str]) -> dict[str, Any]:
    """The key of the store after block `boundary` of a prefix. Raises ValueError when `identity` leaves something open."""
    missing = [name for name in IDENTITY if name not in identity]
    if missing:
        raise ValueError(f"the identity of stored activations lacks {', '.join(missing)}")
    return {"prefix": prefix, "boundary": boundary, "torch": torch.__version__, **identity}


def _add(running: Any, facts: Mapping[str, Any], modules: Iterable[nn.Module]) -> None:
    running.update(json.dumps(facts, sort_keys=True).encode())
    for index, module in enumerate(modules):
        for name, value in sorted(module.state_dict().items()):
            if isinstance(value, Tensor):
                head = [index, name, str(value.dtype), list(value.shape)]
                running.update(json.dumps(head).encode())
                running.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                running.update(json.dumps([index, name, value], sort_keys=True).encode())
