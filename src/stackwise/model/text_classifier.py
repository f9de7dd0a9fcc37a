"""A text classifier on multi-head latent grouped kernel attention (MLGKA)."""

from __future__ import annotations

from typing import Any

from stackwise.model.factory import create_simple_rack
from stackwise.model.heads import SequenceClassifier

FEATURES = 64
"""Random features per head."""


class MLGKATextClassifier(SequenceClassifier):
    """ids [B, T] and their mask [B, T] -> logits [B, C]: MLGKA blocks, the mean over tokens, one linear layer.

    Attention is that of the preset mlgka: latents of d_model/4 for queries and d_model/8 for keys and values, heads
    that share keys, and a Laplacian kernel inside the softmax. The rotary part is a quarter of a head wide, not half of
    it as elsewhere: 0.15 M parameters less, at the default size. The kernel is wider than the preset's: its random
    frequencies have heavy tails, and at bandwidth 1 they make the first gradient of the embedding 29 times that of
    plain attention (in `benchmarks/sst2.py`), at 4 three times, at 16 as large. Bad sizes are ValueErrors.
    """

    def __init__(
        self,
        vocab_size: int = 10000,
        d_model: int = 512,
        d_ff: int = 2048,
        n_heads: int = 8,
        n_kv_heads: int = 2,
        n_layers: int = 6,
        n_classes: int = 2,
        max_seq_len: int = 512,
        *,
        dropout: float = 0.0,
        kernel_bandwidth: float = 16.0,
        seed: int = 0,
    ) -> None:
        attention = {
            "attention_type": "mla",
            "attention_mode": "bidirectional",
            "mla_rope_dim": max(2, d_model // max(1, n_heads) // 8 * 2),
            "kernel_type": "laplacian",
            "kernel_dim": FEATURES,
            "kernel_bandwidth": kernel_bandwidth,
        }
        rack = create_simple_rack(
            n_layers,
            1,
            d_model,
            d_ff,
            n_heads,
            vocab_size,
            n_kv_heads,
            attention_preset="custom",
            attention_custom=attention,
            dropout=dropout,
            max_seq_len=max_seq_len,
            seed=seed,
        )
        super().__init__(rack, n_classes, pooling="mean", dropout=dropout, seed=seed)

    def get_attention_info(self) -> dict[str, Any]:
        """What its attention is: family, heads, kernel and ranks."""
        return self.rack.blocks()[0].spec.attention_info()
