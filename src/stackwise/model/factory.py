"""Racks and stacks from a few numbers, from a config, or from a list of specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stackwise.config.errors import ConfigError, Problem
from stackwise.model.block import Stack
from stackwise.model.block_spec import BlockSpec
from stackwise.model.describe import attention_options, block_spec, rack_spec
from stackwise.model.embedding import OwnEmbedding
from stackwise.model.init import Start, init_weights
from stackwise.model.lexical import take_table_of
from stackwise.model.own_io import Head
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec, StackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.model.settings import ModelSettings


def create_simple_rack(
    n_stacks: int,
    blocks_per_stack: int,
    d_model: int,
    d_ff: int,
    n_heads: int,
    vocab_size: int,
    n_kv_heads: int | None = None,
    attention_preset: str = "bert_style",
    attention_custom: Mapping[str, Any] | None = None,
    tie_embeddings: bool = True,
    use_rope: bool = True,
    rope_theta: float = 1e4,
    dropout: float = 0.0,
    freeze_up_proj: bool = False,
    *,
    max_seq_len: int = 2048,
    seed: int = 0,
    **block_options: Any,
) -> Rack:
    """A rack of equal blocks. n_stacks or blocks_per_stack < 1: ValueError; unknown option: TypeError."""
    for name, value in (("n_stacks", n_stacks), ("blocks_per_stack", blocks_per_stack)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    options: dict[str, Any] = {
        "d_model": d_model,
        "d_ff": d_ff,
        "n_heads": n_heads,
        "dropout": dropout,
        "freeze_up_proj": freeze_up_proj,
        "rope_theta": rope_theta if use_rope else None,
        **attention_options(
            attention_preset, d_model, n_heads, attention_custom, "rope" if use_rope else "learned"
        ),
    }
    if n_kv_heads is not None:
        options["n_kv_heads"] = n_kv_heads
    block = BlockSpec.create({**options, **block_options})
    stacks = tuple(StackSpec(f"s{i}", (block,) * blocks_per_stack, i) for i in range(n_stacks))
    spec = RackSpec(
        vocab_size=vocab_size,
        d_model=d_model,
        stacks=stacks,
        max_seq_len=max_seq_len,
        positions=_positions([block], use_rope),
        norm=block.norm,
        norm_eps=block.norm_eps,
        tied=tie_embeddings,
        dropout=dropout,
    )
    return Rack(spec, seed=seed)


def create_rack_from_config(config: StackWiseConfig | Mapping[str, Any]) -> Rack:
    """The finished rack of a config, a nested mapping or a `to_dict()`; honours every `model.*` key."""
    root = _as_config(config)
    rack = Rack(rack_spec(root), seed=root.training.seed)
    take_table_of(root, rack)
    return rack


def create_stack_from_config(
    stack_id: int,
    n_blocks: int,
    config: StackWiseConfig | ModelSettings | Mapping[str, Any],
    freeze_blocks: bool = False,
) -> Stack:
    """A stack of `n_blocks` blocks as a root or model-level config describes them."""
    from stackwise.model.init import Start, init_weights
    from stackwise.model.settings import ModelSettings

    if n_blocks < 1:
        raise ValueError(f"n_blocks must be at least 1, got {n_blocks}")
    seed = 0
    if isinstance(config, ModelSettings):
        model = config
    else:
        root = _as_config(config)
        model, seed = root.model, root.training.seed
    blocks = tuple(block_spec(model, stack_id * n_blocks + i) for i in range(n_blocks))
    stack = Stack.from_spec(StackSpec(f"s{stack_id}", blocks, stack_id), stack_id)
    init_weights(stack, Start(seed, n_blocks), prefix=f"stacks.s{stack_id}.")
    if freeze_blocks:
        stack.freeze_all()
    return stack


def create_rack_from_specs(
    vocab_size: int,
    d_model: int,
    stack_specs: Sequence[Mapping[str, Any]],
    tie_embeddings: bool = True,
    use_rope: bool = True,
    rope_theta: float = 1e4,
    embedding_layer: nn.Module | None = None,
    *,
    max_seq_len: int = 2048,
    seed: int = 0,
) -> Rack:
    """A rack of unlike stacks.

    Each spec: {stack_id, n_blocks, block_spec, freeze_blocks?}, sorted by id; `block_spec` holds keyword arguments of
    `Block`. A doubled id, unequal widths or an unknown key raise ValueError or TypeError. `embedding_layer`: an
    nn.Embedding, of any width, or a module as in `model.embedding.OwnEmbedding`; of another vocabulary: ConfigError.
    """
    allowed = {"stack_id", "n_blocks", "block_spec", "freeze_blocks"}
    for row in stack_specs:
        if extra := set(row) - allowed:
            raise TypeError(f"unknown key {sorted(extra)[0]!r} in a stack spec; known: {sorted(allowed)}")
    ids = [row["stack_id"] for row in stack_specs]
    if not ids:
        raise ValueError("stack_specs is empty: a rack needs at least one stack")
    if len(set(ids)) != len(ids):
        raise ValueError(f"stack_id must be unique, got {sorted(ids)}")
    rows = sorted(stack_specs, key=lambda row: row["stack_id"])
    stacks, frozen = [], []
    for position, row in enumerate(rows):
        if row["n_blocks"] < 1:
            raise ValueError(f"n_blocks must be at least 1, got {row['n_blocks']} in stack {row['stack_id']}")
        options = {"d_model": d_model, "rope_theta": rope_theta if use_rope else None, **row["block_spec"]}
        block = BlockSpec.create(options)
        stacks.append(StackSpec(f"s{row['stack_id']}", (block,) * row["n_blocks"], position))
        frozen.append(bool(row.get("freeze_blocks", False)))
    first, width = stacks[0].blocks[0], 0
    if embedding_layer is not None:
        held, width = _size_of(embedding_layer)
        if held != vocab_size:
            message = f"is not the vocabulary of the embedding layer, which has {held} tokens"
            raise ConfigError(Problem("vocab_size", message, vocab_size, str(held)))
    spec = RackSpec(
        vocab_size=vocab_size,
        d_model=d_model,
        stacks=tuple(stacks),
        max_seq_len=max_seq_len,
        positions=_positions([block for stack in stacks for block in stack.blocks], use_rope),
        norm=first.norm,
        norm_eps=first.norm_eps,
        tied=tie_embeddings,
        embedding_width=width,
    )
    rack = Rack(spec, seed=seed)
    if isinstance(embedding_layer, nn.Embedding):
        rack.embedding.weight = embedding_layer.weight
    elif embedding_layer is not None:
        _place(rack, embedding_layer, seed)
    for stack, freeze in zip(rack.stacks, frozen, strict=True):
        if freeze:
            stack.freeze_all()
    return rack


def _positions(blocks: Sequence[BlockSpec], use_rope: bool) -> str:
    """How positions enter a rack of such blocks; ALiBi in some of them keeps what the others have."""
    if all(block.alibi for block in blocks):
        return "alibi"
    return "rope" if use_rope else "learned"


def _size_of(layer: Any) -> tuple[int, int]:
    """(tokens, width of the table) of an embedding layer."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    own: Any = OwnEmbedding(layer).module
    return own.vocab_size, own.embedding_dim


def _place(rack: Rack, layer: nn.Module, seed: int) -> None:
    """Put a user's module in the embedding's place, and tie the head to it where the rack is tied."""
    own: Any = OwnEmbedding(layer)
    with torch.no_grad():
        given = layer(torch.zeros(1, 1, dtype=torch.int64, device=rack.device))
    if given.shape != (1, 1, rack.spec.d_model):
        raise ValueError(
            f"the embedding layer gives vectors of {given.shape[-1]}, and the rack is {rack.spec.d_model} wide"
        )
    rack.embedding = own
    if rack.spec.tied:
        _ = own.matrix
        rack.head = Head(rack.spec, own)
        init_weights(rack.head, Start.of(rack.spec, seed), prefix="head.")


def _as_config(config: StackWiseConfig | Mapping[str, Any]) -> StackWiseConfig:
    from stackwise.config.root import StackWiseConfig

    return StackWiseConfig.from_dict(dict(config)) if isinstance(config, Mapping) else config
