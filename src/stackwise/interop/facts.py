"""From the description of a rack back to the keys of `model.*`, and whether two racks compute the same."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from stackwise.model.expert_spec import ExpertSpec
from stackwise.model.spec import RackSpec


def facts_of(spec: RackSpec) -> dict[str, Any]:
    """The keys of `model.*` that all blocks share, as the first one has them; `n_layers` counts the blocks."""
    block = spec.blocks[0]
    rich = next((b for b in spec.blocks if b.experts is not None), block)
    facts = {
        **_plain(spec),
        **_plain(block),
        "head_dim": block.head_dim,
        "attention_softcap": block.softcap,
        "tie_embeddings": spec.tied,
        "n_layers": len(spec.blocks),
    }
    if rich.experts is not None:
        facts |= {f"moe.{name}": value for name, value in _plain(rich.experts).items()}
        facts |= {"moe.d_ff": rich.experts.width or rich.d_ff, "moe.first_dense": spec.blocks.index(rich)}
    if block.latent is not None:
        names = {"q_rank": "mla_rq", "kv_rank": "mla_rkv", "rope_dim": "mla_rope_dim"}
        facts |= {f"attention_overrides.{names[n]}": getattr(block.latent, n) for n in names}
    return facts


def _plain(part: Any) -> dict[str, Any]:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {
        name: value
        for name, value in values.items()
        if value is None or isinstance(value, bool | int | float | str)
    }


def differences(spec: RackSpec, other: RackSpec) -> list[str]:
    """What makes two racks compute different things, as `name: this one, that one`; how stacks are cut makes none."""
    mine, theirs = _computed(spec), _computed(other)
    if len(spec.blocks) != len(other.blocks):
        return [f"blocks: {len(spec.blocks)}, not {len(other.blocks)}"]
    found: dict[str, str] = {}
    for name in mine:
        if name != "blocks" and mine[name] != theirs[name]:
            found |= _told(name, "", mine[name], theirs[name])
    for number, (block, wanted) in enumerate(zip(mine["blocks"], theirs["blocks"], strict=True)):
        for name in block:
            if block[name] != wanted[name]:
                told = _told(name, f" of block {number}", block[name], wanted[name])
                found |= {key: text for key, text in told.items() if key not in found}
    return list(found.values())


def _told(name: str, where: str, mine: Any, theirs: Any) -> dict[str, str]:
    """A difference in words by what it is about; of parts in parts the single fields, or which of the two has the part."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return {
            f"{name}.{key} {bool(where)}": f"{name}.{key}{where} is {mine[key]}, not {theirs[key]}"
            for key in mine
            if mine[key] != theirs[key]
        }
    one, other = (
        "there" if isinstance(value, dict) else "missing" if isinstance(against, dict) else value
        for value, against in ((mine, theirs), (theirs, mine))
    )
    return {f"{name} {bool(where)}": f"{name}{where} is {one}, not {other}"}


def _computed(spec: RackSpec) -> dict[str, Any]:
    """The description without what only training knows."""
    blocks = [
        replace(
            block,
            dropout=0.0,
            zero_init_outputs=False,
            freeze_up_proj=False,
            head_width=block.head_dim,
            experts=_chosen(block.experts, block.d_ff),
            score_width=None if block.score_width == block.head_dim else block.score_width,
            attention_bias="all" if block.out_bias else "qkv" if block.qkv_bias else "none",
        )
        for block in spec.blocks
    ]
    plain = asdict(replace(spec, dropout=0.0, planned_blocks=0, stacks=(), tail=()))
    return {**plain, "blocks": [asdict(block) for block in blocks], "stacks": None, "tail": None}


def _chosen(experts: ExpertSpec | None, d_ff: int) -> ExpertSpec | None:
    """Experts without what balances them in training."""
    if experts is None:
        return None
    return replace(experts, width=experts.width or d_ff, aux_weight=0.0, bias_rate=0.0, z_weight=0.0)
