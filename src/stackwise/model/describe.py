"""From settings to descriptions: the one reading of `model.*` that every factory, builder and planner uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stackwise.config.embedding_rules import ties
from stackwise.config.errors import ConfigError, Problem
from stackwise.config.objective_rules import masks, time_of
from stackwise.config.rules import appends, stacks_at_the_end
from stackwise.model.attention_settings import AttentionFields, attention_fields
from stackwise.model.block_spec import BlockSpec
from stackwise.model.expert_spec import ExpertSpec
from stackwise.model.parts import KernelSpec, LatentSpec
from stackwise.model.pretrained import Table, find_table
from stackwise.model.rope_scaling import RopeScaling, growth
from stackwise.model.settings import ModelSettings
from stackwise.model.spec import RackSpec, StackSpec, TimeSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def attention_options(
    preset: str,
    d_model: int,
    n_heads: int,
    custom: Mapping[str, Any] | None = None,
    positions: str = "rope",
) -> dict[str, Any]:
    """Block options of a named attention preset. custom without fields: ValueError."""
    fields = AttentionFields(**custom) if custom is not None else None
    if preset == "custom" and fields is None:
        raise ValueError("attention_preset custom needs attention_custom with the attention's fields")
    settings = ModelSettings(
        d_model=d_model,
        n_heads=n_heads,
        attention_preset=preset,
        attention_custom=fields,
        pos_encoding=positions,
    )
    return _options(settings)


def _options(model: ModelSettings) -> dict[str, Any]:
    fields = attention_fields(model)
    return {
        "attention_type": fields["attention_type"],
        "causal": fields["attention_mode"] == "causal",
        "n_kv_heads": fields["n_kv_heads"],
        "qk_norm": fields["qk_norm"],
        "latent": _latent(fields, model.scaled_rope),
        "kernel": _kernel(fields),
    }


def _latent(fields: Mapping[str, Any], scaling: RopeScaling | None) -> LatentSpec | None:
    if fields["attention_type"] != "mla":
        return None
    scale = 1.0
    if scaling is not None and scaling.mscale_all_dim is not None:
        scale = (
            growth(scaling.factor, scaling.mscale_all_dim) ** 2
        )  # of all scores, not of rotated numbers alone
    return LatentSpec(fields["mla_rq"], fields["mla_rkv"], fields["mla_rope_dim"], scale=scale)


def _kernel(fields: Mapping[str, Any]) -> KernelSpec | None:
    """Null for the linear kernel inside the softmax, which is plain attention."""
    kind, mode = fields["kernel_type"], fields["kernel_mode"]
    if kind == "linear" and mode != "linear":
        return None
    norm = fields["kernel_norm"] if kind == "laplacian" else "l2"
    return KernelSpec(kind, mode, fields["kernel_dim"], fields["kernel_bandwidth"], norm)


def expert_spec(model: ModelSettings, layer: int | None) -> ExpertSpec | None:
    """The experts of a layer, counted from the embedding; null: it is dense. `layer` null: one that has experts."""
    moe = model.moe
    if not (moe.n_experts if layer is None else moe.at(layer)):
        return None
    fields = moe.model_dump(exclude={"d_ff", "every", "first_dense"})
    return ExpertSpec(width=moe.d_ff or 0, **fields)


def block_spec(model: ModelSettings, layer: int | None = None) -> BlockSpec:
    """One block as the model settings describe it; `layer` is its place from the embedding, null where that is open."""
    windowed, theta = model.sees_window(layer), None
    local = windowed and model.local_rope_theta is not None
    if model.positions == "rope":
        theta = model.local_rope_theta if local else model.rope_theta
    return BlockSpec(
        d_model=model.d_model,
        n_heads=model.n_heads,
        d_ff=model.ffn_width,
        rope_theta=theta,
        norm=model.norm,
        norm_eps=model.norm_eps,
        norm_placement=model.norm_placement,
        ffn_type=model.ffn_type,
        freeze_up_proj=model.freeze_up_proj,
        bias=model.bias,
        dropout=model.dropout,
        residual_gain=1.0 if model.residual_gain is None else model.residual_gain,
        zero_init_outputs=model.zero_init_outputs,
        short_conv=model.short_conv,
        head_width=model.head_dim or 0,
        attention_bias=model.attention_bias or "",
        rope_scaling=None if local else model.scaled_rope,
        window=model.sliding_window if windowed else None,
        sinks=model.attention_sinks if windowed else 0,
        alibi=model.positions == "alibi",
        softcap=model.attention_softcap,
        score_width=model.score_width,
        parallel=model.parallel_layers,
        attn_input_norm=model.first_norm or layer != 0,
        experts=expert_spec(model, layer),
        **_options(model),
    )


def time_spec(config: StackWiseConfig) -> TimeSpec | None:
    """How the rack is told the time of the noise; null where it is not."""
    if time_of(config) != "input":
        return None
    keys = config.training.progressive
    return TimeSpec(
        keys.time_embedding_dim or config.model.d_model,
        keys.num_time_steps or stacks_at_the_end(config) * keys.time_per_stack,
        keys.time_encoding_type,
        keys.time_conditioning,
    )


def tail_blocks(config: StackWiseConfig) -> int:
    """Global head blocks of the rack: an append run has them."""
    return config.training.progressive.global_head_blocks if appends(config) else 0


def stack_blocks(config: StackWiseConfig) -> list[tuple[BlockSpec, ...]]:
    """The blocks of every stack of the finished rack, by position."""
    model, count = config.model, stacks_at_the_end(config)
    each = model.architecture.blocks_per_stack
    if model.stacks is None:
        sizes, models = [each] * count, [model] * count
    else:
        sizes = [stack.n_blocks or each for stack in model.stacks[:count]]
        models = [stack.applied_to(model) for stack in model.stacks[:count]]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        tuple(block_spec(own, first + i) for i in range(size))
        for own, size, first in zip(models, sizes, firsts, strict=True)
    ]


def table_of(config: StackWiseConfig) -> Table | None:
    """The pretrained table that the embedding starts from; null where it is fresh. Its values are not read.

    ConfigError where there is none, or where its width or its number of tokens is not the model's.
    """
    model, keys = config.model, config.model.tokenizer_embedding
    if keys.family is None:
        return None
    table = find_table(keys.family, keys.embedding_option)
    if model.embedding_width not in (None, table.width):
        message = f"is not the width of the table of {keys.family}, which is {table.width}"
        problem = Problem("model.embedding_width", message, model.embedding_width, f"null or {table.width}")
        raise ConfigError(problem)
    added = config.objective.mask_token_id == table.rows and masks(config)
    if model.vocab_size not in (table.rows, table.rows + added):
        message = f"does not fit the table of {keys.family}, which has {table.rows} tokens"
        hint = f"set it to {table.rows} if the tokenizer is that of the family, or take a fresh table"
        raise ConfigError(Problem("model.vocab_size", message, model.vocab_size, str(table.rows), hint))
    return table


def rack_spec(config: StackWiseConfig, n_stacks: int | None = None) -> RackSpec:
    """The rack of a config, with its first `n_stacks` stacks (null: as many as the run ends with).

    `model.vocab_size` must be set by then; the tokenizer's size is filled in when the data is prepared.
    """
    model = config.model
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is not set: give it, or let the tokenizer of a run set it")
    stacks = stack_blocks(config)
    depth = sum(map(len, stacks))
    tail = tuple(block_spec(model, depth + i) for i in range(tail_blocks(config)))
    count = len(stacks) if n_stacks is None else n_stacks
    built = [*stacks, *(stacks[-1:] * (count - len(stacks)))][:count]
    table = table_of(config)
    frozen = table is not None and model.tokenizer_embedding.freeze_embeddings
    return RackSpec(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        stacks=tuple(
            StackSpec(f"s{i}", blocks, i, spectral=model.spectral_norm) for i, blocks in enumerate(built)
        ),
        tail=tail,
        max_seq_len=model.max_seq_len,
        positions=model.positions,
        norm=model.norm,
        norm_eps=model.norm_eps,
        tied=ties(config),
        dropout=model.dropout,
        embedding_norm=model.embedding_norm,
        embedding_scale=model.embedding_scale,
        token_types=model.token_types,
        embedding_width=(model.embedding_width or 0) if table is None else table.width,
        adapter_hidden=model.tokenizer_embedding.adapter_hidden_dim or 0,
        frozen_rows=table.rows if table is not None and frozen else 0,
        tie_adapter=model.tie_adapter,
        head_rank=model.head_rank or 0,
        head_transform=model.head_transform,
        head_bias=model.head_bias,
        logit_softcap=model.logit_softcap,
        final_norm=model.final_norm,
        time=time_spec(config),
        planned_blocks=depth + len(tail),
    )
