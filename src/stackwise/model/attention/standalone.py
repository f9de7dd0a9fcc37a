"""Attention by itself, made from the same fields as that of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stackwise.config.errors import did_you_mean
from stackwise.model.attention_settings import AttentionFields
from stackwise.model.describe import block_spec
from stackwise.model.registry import ATTENTIONS
from stackwise.model.settings import ModelSettings
from stackwise.model.visibility import Visibility

SHAPE = {
    "d_model": 768,
    "n_heads": 12,
    "n_kv_heads": None,
    "dropout": 0.0,
    "bias": False,
    "max_seq_len": 2048,
}
OTHERS = {"attention_preset": "bert_style", "pos_encoding": "rope", "rope_theta": 1e4, "seed": 0}


class CoreAttention(nn.Module):
    """The attention of one block, x [B, T, D] -> [B, T, D], without the norm in front of it.

    Made by `from_config`; `get_config` gives all fields, and from them the same weights and random features again,
    those that have not trained.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        from stackwise.model.init import Start, init_weights

        super().__init__()
        names = [*SHAPE, *OTHERS, *AttentionFields.model_fields]
        for name in fields:
            if name not in names:
                close = did_you_mean(name, names)
                raise TypeError(f"unknown attention field {name!r}" + (f"; {close}" if close else ""))
        given = {**SHAPE, **OTHERS, **fields}
        self.seed = given.pop("seed")
        chosen = {name: given.pop(name) for name in AttentionFields.model_fields if name in given}
        self.model = ModelSettings(**given, attention_overrides=AttentionFields(**chosen))
        self.spec = block_spec(self.model)
        self.attn = ATTENTIONS.get(self.spec.attention_type)(self.spec)
        init_weights(self.attn, Start(self.seed, 1), prefix="attn.")

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> CoreAttention:
        """From the fields of an attention, a shape (d_model, n_heads, n_kv_heads, dropout, bias, max_seq_len), a preset
        that says what the fields leave open, positions and a seed. Unknown: TypeError, wrong values: ValueError."""
        return cls(fields)

    def get_config(self) -> dict[str, Any]:
        """All fields, also those that were left open."""
        shape = {name: getattr(self.model, name) for name in (*SHAPE, *OTHERS) if name != "seed"}
        return {**shape, **self.model.attention, "seed": self.seed}

    def get_attention_info(self) -> dict[str, Any]:
        """Family, heads, kernel and ranks."""
        return self.spec.attention_info()

    def forward(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Masks as those of `Rack.forward`. More than `max_seq_len` tokens under rotary positions: ValueError."""
        from stackwise.model.block import Context

        tokens, longest = x_BTD.shape[1], self.model.max_seq_len
        if tokens > longest and self.spec.rope_theta is not None:
            raise ValueError(f"{tokens} tokens are more than max_seq_len = {longest}")
        visibility = Visibility(tokens, 0, attention_mask, document_ids, x_BTD.device)
        context = Context(visibility=visibility, position_ids=position_ids, max_seq_len=longest)
        out: Tensor = self.attn(x_BTD, context)
        return out
