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

    @property
    def gain(self) -> Tensor:
        """What each column is multiplied by: [width]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain, self.eps)


@NORM_LAYERS.register("rmsnorm_offset")
class OffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight) over the last dimension, the weight starting at 0 (Gemma, arXiv 2403.08295).

    Narrow formats are finest around 0, so a weight near 1 is kept more exactly this way.
    """

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    @property
    def gain(self) -> Tensor:
        # widened first: 1 + weight in bf16 would lose what the weight is kept for
        return 1.0 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


def rms_norm_like(norm: str) -> type[RMSNorm]:
    """The norm of heads and latents in a model whose residual stream has the norm `norm`; never a LayerNorm."""
    return OffsetRMSNorm if norm == "rmsnorm_offset" else RMSNorm


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
