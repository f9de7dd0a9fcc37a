"""What DeepSeek-V2 and V3 share: latent attention, dense layers first, then experts beside shared ones.

V2: Liu et al. 2024, arXiv 2405.04434. V3: Liu et al. 2024, arXiv 2412.19437.
"""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.changes import Change
from stackwise.interop.families.common import (
    LLAMA_KEYS,
    LLAMA_SETTINGS,
    feed_forward_rows,
    norm_rows,
    read_rope,
    write_rope,
)
from stackwise.interop.family import Key, Settings, words
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec

SETTINGS: Settings = {**LLAMA_SETTINGS, "bias": False, "attention_overrides.attention_type": "mla"}
_OTHERWISE = {"num_key_value_heads", "head_dim", "rms_norm_eps"}
KEYS = (
    *(key for key in LLAMA_KEYS if key.theirs not in _OTHERWISE),
    Key("kv_lora_rank", "attention_overrides.mla_rkv", default=512),
    Key("q_lora_rank", "attention_overrides.mla_rq", default=0),
    Key("qk_rope_head_dim", "attention_overrides.mla_rope_dim", default=64),
    Key("qk_nope_head_dim", "head_dim", default=128),
    Key("n_routed_experts", "moe.n_experts"),
    Key("num_experts_per_tok", "moe.top_k"),
    Key("n_shared_experts", "moe.n_shared"),
    Key("moe_intermediate_size", "moe.d_ff"),
    Key("first_k_dense_replace", "moe.first_dense", default=0),
    Key("routed_scaling_factor", "moe.scale", default=1.0),
)
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "rms_norm_eps": (1e-6,),
    "ep_size": (1,),
}
IGNORED = words("head_dim qk_head_dim output_router_logits aux_loss_alpha seq_aux pretraining_tp auto_map")
"""`auto_map` names code of the folder; Transformers has classes of its own for these models."""


def read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """Positions, and widths that must agree."""
    read_rope(config, settings, problems)
    settings["norm_eps"] = 1e-6  # of the latents it is always this one
    heads, width = settings.get("n_heads"), settings["head_dim"]
    if config.get("num_key_value_heads", heads) != heads:
        message = "must be num_attention_heads: every head has keys of its own from the latent"
        problems.append(
            Problem("num_key_value_heads", message, config.get("num_key_value_heads"), str(heads))
        )
    if config.get("v_head_dim", 128) != width:
        problems.append(
            Problem("v_head_dim", "must be qk_nope_head_dim", config.get("v_head_dim"), str(width))
        )


def write(spec: RackSpec) -> dict[str, Any]:
    """What single keys do not say."""
    block = spec.blocks[0]
    latent = block.latent
    written = write_rope(spec) | {"num_key_value_heads": block.n_kv_heads, "v_head_dim": block.head_dim}
    return written | {"q_lora_rank": (latent.q_rank or None) if latent is not None else None}


def rows(spec: BlockSpec, turn: Change, offsets: bool) -> list[Row]:
    """A layer. `turn`: the change of rotary rows. `offsets`: the router has them."""
    latent, experts = spec.latent, spec.experts
    assert latent is not None
    listed = [
        *norm_rows(),
        row("self_attn.kv_a_proj_with_mqa.weight", "attn.kv_down.weight"),
        row("self_attn.kv_a_layernorm.weight", "attn.kv_norm.weight"),
        row("self_attn.kv_b_proj.weight", "attn.kv_up.weight"),
        row("self_attn.o_proj.weight", "attn.o.weight"),
    ]
    if latent.q_rank:
        listed += [
            row("self_attn.q_a_proj.weight", "attn.q_down.weight"),
            row("self_attn.q_a_layernorm.weight", "attn.q_norm.weight"),
            row("self_attn.q_b_proj.weight", "attn.q_up.weight", turn),
        ]
    else:
        listed.append(row("self_attn.q_proj.weight", "attn.q.weight", turn))
    if experts is None:
        return [*listed, *feed_forward_rows("mlp", "ffn")]
    listed.append(row("mlp.gate.weight", "ffn.router.weight"))
    if offsets:
        listed.append(row("mlp.gate.e_score_correction_bias", "ffn.router.selection_bias"))
    for expert in range(experts.n_experts):
        listed += feed_forward_rows(f"mlp.experts.{expert}", f"ffn.experts.{expert}")
    return [*listed, *(feed_forward_rows("mlp.shared_experts", "ffn.shared") if experts.n_shared else [])]
