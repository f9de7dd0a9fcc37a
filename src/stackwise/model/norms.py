"""Normalisation layers. Statistics are fp32 or wider whatever the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.kernels.rms_norm import compute_dtype, rms_norm
from stackwise.model.registry import NORM_LAYERS


@NORM_LAYERS.register("rmsnorm")
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@NORM_LAYERS.register("layernorm")
class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), x.shape[-1:], self.weight, self.bias, self.eps)
        return normed.to(compute_dtype(x))
