"""Settings of the attention: what kind it is, what it sees, and the presets that name common choices."""

from typing import Annotated, Literal

from stackwise.config.base import Settings
from stackwise.config.types import Flag, OneOf

ATTENTION_TYPES = ["mha"]
"""The names a key accepts, open: `model/` adds a name here when a part is registered."""

AttentionType = Annotated[str, OneOf(ATTENTION_TYPES)]
AttentionMode = Literal["bidirectional", "causal"]
Preset = Literal["bert_style", "gpt_style", "efficient_gqa", "custom"]


class AttentionFields(Settings):
    """Fields of the attention; null means not given here."""

    attention_type: AttentionType | None = None
    """Kind of attention; mha covers multi-head, grouped-query and multi-query by `n_kv_heads`."""
    attention_mode: AttentionMode | None = None
    """Whether a position sees only itself and earlier ones (causal) or all (bidirectional)."""
    qk_norm: Flag | None = None
    """Normalise queries and keys per head before their product."""
