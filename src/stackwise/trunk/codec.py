"""Activations as bytes: float32, bfloat16, or fp8 with one scale per token.

fp8 is float8_e4m3fn: q = round(x / s), s = max|x| of the token / 448, kept in float32. Values that are not finite stay
so. Shape letters: B samples, T tokens, D model width, E bytes of an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackwise.trunk.layout import STORED, entry_bytes

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


class Codec:
    """Turns boundary outputs [B, T, D] into entries, uint8 [B, E], and back."""

    def __init__(self, shape: tuple[int, int], dtype: str) -> None:
        if dtype not in STORED:
            raise ValueError(f"dtype is {dtype!r}, allowed: {', '.join(STORED)}")
        tokens, width = shape
        if tokens < 1 or width < 1:
            raise ValueError(f"an entry is [T, D] with at least one token and number, got {list(shape)}")
        self.shape, self.dtype = (tokens, width), dtype
        self.entry_bytes = entry_bytes(shape, dtype)

    def encode(self, x_BTD: Tensor) -> Tensor:
        """uint8 [B, E] on the device of `x_BTD`."""
        if self.dtype != "fp8":
            kept = x_BTD.to(getattr(torch, self.dtype)).contiguous()
            return kept.flatten(1).view(torch.uint8)
        x_BTD = x_BTD.float()
        top_BT1 = x_BTD.abs().amax(-1, keepdim=True)
        scale_BT1 = (top_BT1 / _FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        numbers = (x_BTD / scale_BT1).to(_FP8).view(torch.uint8)
        return torch.cat((numbers.flatten(1), scale_BT1.flatten(1).view(torch.uint8)), dim=1)

    def decode(self, raw_BE: Tensor, values: torch.dtype) -> Tensor:
        """[B, T, D] in `values`, on the device of `raw_BE`."""
        shape = (raw_BE.shape[0], *self.shape)
        if self.dtype != "fp8":
            return raw_BE.view(getattr(torch, self.dtype)).view(shape).to(values)
        count = self.shape[0] * self.shape[1]
        scale = raw_BE[:, count:].contiguous().view(torch.float32)
        numbers = raw_BE[:, :count].reshape(shape).view(_FP8)
        return (numbers.float() * scale.unsqueeze(-1)).to(values)

    def round(self, x_BTD: Tensor) -> Tensor:
        """What a store would give back for `x_BTD`."""
        return self.decode(self.encode(x_BTD), x_BTD.dtype)
