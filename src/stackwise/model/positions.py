"""Positions that are added to the embedding. Rotary positions and ALiBi act inside attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stackwise.model.registry import POSITION_LAYERS


@POSITION_LAYERS.register("learned")
class LearnedPositions(nn.Module):
    """A trained table [max_seq_len, d_model]."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(max_seq_len, d_model))

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.weight[position_ids]


@POSITION_LAYERS.register("sinusoidal")
class SinusoidalPositions(nn.Module):
    """sin and cos of p / 10000^(2i/d), fixed (Vaswani et al. 2017, arXiv 1706.03762)."""

    table: Tensor

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        pairs = torch.arange(0, d_model, 2, dtype=torch.float64)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), 10_000.0 ** (-pairs / d_model))
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[:, :d_model]
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.table[position_ids]


@POSITION_LAYERS.register("rope")
@POSITION_LAYERS.register("alibi")
@POSITION_LAYERS.register("none")
def _nothing_added(max_seq_len: int, d_model: int) -> None:
    """Nothing is added to the embedding."""
