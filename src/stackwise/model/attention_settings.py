"""Settings of the attention: what kind it is, what it sees, and the presets that name common choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from stackwise.config.base import Settings
from stackwise.config.types import Flag, Int, NonNegativeInt, OneOf, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from stackwise.model.settings import ModelSettings

ATTENTION_TYPES = ["mha", "mla"]
"""The names a key accepts, open: `model/` adds a name here when a part is registered."""
KERNEL_TYPES = ("linear", "gaussian", "laplacian", "uniform")
KERNEL_MODES = ("score", "linear", "exact")
KERNEL_NORMS = ("l2", "l1")

AttentionType = Annotated[str, OneOf(ATTENTION_TYPES)]
AttentionMode = Literal["bidirectional", "causal"]
Preset = Literal[
    "bert_style", "gpt_style", "efficient_gqa", "mla_attention", "kernel_attention", "mlgka", "custom"
]
KernelType = Literal["linear", "gaussian", "laplacian", "uniform"]


class AttentionFields(Settings):
    """Fields of the attention; null means not given here."""

    attention_type: AttentionType | None = None
    """Kind of attention; mha covers multi-head, grouped-query and multi-query by `n_kv_heads`, mla is multi-head latent attention."""
    attention_mode: AttentionMode | None = None
    """Whether a position sees only itself and earlier ones (causal) or all (bidirectional)."""
    qk_norm: Flag | None = None
    """Normalise queries and keys per head before their product; mla normalises its latents instead."""
    mla_rq: NonNegativeInt | None = None
    """Width of the latent of the queries under mla; 0 leaves them uncompressed. null: a quarter of `d_model`."""
    mla_rkv: PositiveInt | None = None
    """Width of the latent that keys and values share under mla, which the cache holds. null: an eighth of `d_model`."""
    mla_rope_dim: Annotated[Int, Ge(0)] | None = None
    """Rotated numbers of a head under mla, beside those that are not; even. null: half of the head width under rope, else 0."""
    kernel_type: KernelType | None = None
    """How queries and keys are compared: linear is their product, gaussian, laplacian and uniform depend on their difference."""
    kernel_dim: PositiveInt | None = None
    """Random features of a kernel; its square root is what learned factors on the scores start from. null: 64."""
    kernel_mode: Literal["score", "linear", "exact"] | None = None
    """Random features inside the softmax (score), in its place at a cost linear in the length (linear), or the kernel itself inside it (exact). null: score."""
    kernel_bandwidth: PositiveFloat | None = None
    """Distance over which a kernel falls. null: 1."""
    kernel_norm: Literal["l2", "l1"] | None = None
    """Distance of the laplacian kernel. null: l2."""


def quarter_of_heads(n_heads: int) -> int:
    """The largest divisor that is at most a quarter of the heads; 1 where none is."""
    parts = range(4, min(n_heads, 4096) + 1)  # more heads than that are nobody's wish
    return next((n_heads // part for part in parts if n_heads % part == 0), 1)


def preset_fields(preset: str, n_heads: int) -> dict[str, Any]:
    """What a preset says; custom says nothing by itself."""
    fields: dict[str, Any] = {
        "attention_type": "mla" if preset in ("mla_attention", "mlgka") else "mha",
        "attention_mode": "causal" if preset == "gpt_style" else "bidirectional",
        "n_kv_heads": quarter_of_heads(n_heads) if preset in ("efficient_gqa", "mlgka") else n_heads,
        "kernel_type": {"kernel_attention": "gaussian", "mlgka": "laplacian"}.get(preset, "linear"),
        "kernel_dim": 64,
        "kernel_mode": "score",
        "kernel_bandwidth": 1.0,
        "kernel_norm": "l2",
    }
    return fields


def attention_fields(model: ModelSettings) -> dict[str, Any]:
    """What preset, `attention_custom` and `attention_overrides` come to: all fields and n_kv_heads, none of them null.

    A given `model.n_kv_heads` wins over the preset; efficient_gqa and mlgka take the largest divisor of `n_heads` that
    is at most a quarter of it.
    """
    fields = {**preset_fields(model.attention_preset, model.n_heads), "qk_norm": model.qk_norm}
    if model.attention_preset == "custom" and model.attention_custom is not None:
        fields |= model.attention_custom.model_dump(exclude_none=True)
    fields |= model.attention_overrides.model_dump(exclude_none=True)
    if model.n_kv_heads is not None:
        fields["n_kv_heads"] = model.n_kv_heads
    head = model.head_dim or model.d_model // model.n_heads
    fields.setdefault("mla_rq", max(1, model.d_model // 4))
    fields.setdefault("mla_rkv", max(1, model.d_model // 8))
    fields.setdefault("mla_rope_dim", 2 * max(1, head // 4) if model.positions == "rope" else 0)
    return fields
