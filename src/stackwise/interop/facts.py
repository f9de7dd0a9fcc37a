"""From the description of a rack back to the keys of `model.*`, and whether two racks compute the same."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from stackwise.model.spec import RackSpec


def facts_of(spec: RackSpec) -> dict[str, Any]:
    """The keys of `model.*` that all blocks share, as the first one has them; `n_layers` counts the blocks."""
    block = spec.blocks[0]
    return {
        **{
            name: value for name, value in asdict(block).items() if not isinstance(value, dict | list | tuple)
        },
        "head_dim": block.head_dim,
        "vocab_size": spec.vocab_size,
        "max_seq_len": spec.max_seq_len,
        "tie_embeddings": spec.tied,
        "n_layers": len(spec.blocks),
    }


def differences(spec: RackSpec, other: RackSpec) -> list[str]:
    """What makes two racks compute different things, as `name: this one, that one`; how stacks are cut makes none."""
    mine, theirs = _computed(spec), _computed(other)
    if len(spec.blocks) != len(other.blocks):
        return [f"blocks: {len(spec.blocks)}, not {len(other.blocks)}"]
    found: dict[str, str] = {}
    for name in mine:
        if name != "blocks" and mine[name] != theirs[name]:
            found[name] = f"{name} is {mine[name]}, not {theirs[name]}"
    for number, (block, wanted) in enumerate(zip(mine["blocks"], theirs["blocks"], strict=True)):
        for name in block:
            if block[name] != wanted[name]:
                found.setdefault(
                    f"block {name}", f"{name} of block {number} is {block[name]}, not {wanted[name]}"
                )
    return list(found.values())


def _computed(spec: RackSpec) -> dict[str, Any]:
    """The description without what only training knows."""
    blocks = [
        replace(
            block,
            dropout=0.0,
            zero_init_outputs=False,
            freeze_up_proj=False,
            head_width=block.head_dim,
            attention_bias="all" if block.out_bias else "qkv" if block.qkv_bias else "none",
        )
        for block in spec.blocks
    ]
    plain = asdict(replace(spec, dropout=0.0, planned_blocks=0, stacks=(), tail=()))
    return {**plain, "blocks": [asdict(block) for block in blocks], "stacks": None, "tail": None}
