"""What the families around Llama share: names of tensors, and rotary positions in config.json."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.changes import Halves
from stackwise.interop.family import Settings
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec

ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "head_dim"})


def llama_ends(spec: RackSpec) -> list[Row]:
    """Embedding, final norm and head as Llama names them."""
    rows = [row("model.embed_tokens.weight", "embedding.weight"), row("model.norm.weight", "norm.weight")]
    return rows if spec.tied else [*rows, row("lm_head.weight", "head.weight")]


def attention_rows(spec: BlockSpec) -> list[Row]:
    """Grouped attention; queries and keys change the order of their rotary pairs."""
    turn = Halves(spec.head_dim)
    rows = [
        row("self_attn.q_proj.weight", "attn.q.weight", turn),
        row("self_attn.k_proj.weight", "attn.k.weight", turn),
        row("self_attn.v_proj.weight", "attn.v.weight"),
        row("self_attn.o_proj.weight", "attn.o.weight"),
    ]
    if spec.qk_norm:
        rows += [row(f"self_attn.{x}_norm.weight", f"attn.{x}_norm.weight", turn) for x in "qk"]
    return rows


def gated_block(spec: BlockSpec) -> list[Row]:
    """A layer with a norm before each of its two halves."""
    return [
        row("input_layernorm.weight", "attn_norm.weight"),
        row("post_attention_layernorm.weight", "ffn_norm.weight"),
        *attention_rows(spec),
        *(row(f"mlp.{x}_proj.weight", f"ffn.{x}.weight") for x in ("gate", "up", "down")),
    ]


def read_rope(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """Base of the rotation and its scaling, from the form of today (rope_parameters) or the older one."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings["rope_theta"] = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind != "default":
        problems.append(Problem("rope_scaling", "is not understood", kind, "default"))
    width, heads = config.get("head_dim"), settings.get("n_heads")
    if width is not None and heads and width * heads != settings.get("d_model"):
        problems.append(Problem("head_dim", "must be hidden_size / num_attention_heads", width))


def write_rope(spec: RackSpec) -> dict[str, Any]:
    """The older form, which every version of Transformers reads."""
    block = spec.blocks[0]
    return {"rope_theta": block.rope_theta, "rope_scaling": None, "head_dim": block.head_dim}
