"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) as one complex product.

Pair i of a head, numbers (2i, 2i + 1), is turned at position m by the angle m * theta^(-2i/H), or another one where
positions are scaled (`model.rope_scaling`). Adjacent pairs are one
complex number each, so the rotation is a single multiplication; models whose pairs are (i, i + H/2) differ only by a
permutation of the rows of the query and key projections, which import and export apply.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def rotary_table(
    frequencies: tuple[float, ...], magnitude: float, length: int, device: torch.device, wide: bool
) -> Tensor:
    """Complex factors r e^(i m w_j) of angles w per position: [length, pairs], complex64 (complex128 when `wide`)."""
    with torch.inference_mode(False):  # the table outlives the call; a training step may need it later
        positions = torch.arange(length, dtype=torch.float64)
        angles = torch.outer(positions, torch.tensor(frequencies, dtype=torch.float64))
        table = torch.polar(torch.full_like(angles, magnitude), angles)
        return table.to(torch.complex128 if wide else torch.complex64).to(device)


def rotate(x_BTNH: Tensor, factors: Tensor) -> Tensor:
    """Turn queries or keys. x [B, T, N, H], factors [T, H/2] or [B, T, H/2] -> [B, T, N, H], in x's dtype."""
    wide = torch.promote_types(x_BTNH.dtype, torch.float32)
    pairs = torch.view_as_complex(x_BTNH.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors.unsqueeze(-2)).flatten(-2).to(x_BTNH.dtype)


def rotate_reference(x_BTNH: Tensor, positions: Tensor, theta: float) -> Tensor:
    """The same by sines and cosines, for tests. positions [T]."""
    head_dim = x_BTNH.shape[-1]
    pairs = torch.arange(0, head_dim, 2, dtype=x_BTNH.dtype)
    angles = torch.outer(positions.to(x_BTNH.dtype), theta ** (-pairs / head_dim))[None, :, None]
    even, odd = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)
