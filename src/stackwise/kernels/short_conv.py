"""Short depthwise convolution along the tokens, with its gradient written by hand.

y_t = sum_j w_j * x_{t - o_j}   (causal, o = 0, 1, 2, ...: as before the mixers of So et al. 2021, arXiv 2109.08668)

o_j are the lags: 0, 1, 2, ... looks back, 0, 1, -1, 2, -2, ... looks both ways. PyTorch's depthwise convolution is slow
for a handful of taps on a CPU and wants channels first; shifted products need neither. Tokens before the first and
behind the last count as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Cut = tuple[slice, slice]
"""Where a lag reads, and where it writes, along the tokens."""


def lags_of(width: int, both_ways: bool) -> list[int]:
    """The lag of each tap."""
    if not both_ways:
        return list(range(width))
    return [0, *(lag for step in range(1, width // 2 + 1) for lag in (step, -step))]


def _cuts(lags: list[int], length: int) -> list[tuple[int, Cut]]:
    """(tap, where it reads, where it writes) of every lag but 0 that stays inside the row."""
    cuts = []
    for tap, lag in enumerate(lags):
        n = abs(lag)
        if 0 < n < length:
            early, late = slice(None, length - n), slice(n, None)
            cuts.append((tap, (early, late) if lag > 0 else (late, early)))
    return cuts


def short_conv_reference(
    x_BTD: Tensor, weight_KD: Tensor, same: list[Tensor] | None = None, both_ways: bool = False
) -> Tensor:
    """The formula, by autograd. `same[n - 1]` [B, T, 1] says whether token t - n may be seen from token t."""
    length, lags = x_BTD.shape[1], lags_of(weight_KD.shape[0], both_ways)
    y_BTD = x_BTD * weight_KD[0]
    for tap, (source, _) in _cuts(lags, length):
        n = abs(lags[tap])
        shifted = x_BTD[:, source] * weight_KD[tap]
        if same is not None:
            shifted = shifted * same[n - 1][:, n:]
        y_BTD = y_BTD + torch.nn.functional.pad(shifted, (0, 0, n, 0) if lags[tap] > 0 else (0, 0, 0, n))
    return y_BTD


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, both_ways: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.cuts = _cuts(lags_of(weight.shape[0], both_ways), x.shape[1])
        taps = weight.to(x.dtype)
        y = x * taps[0]
        for tap, (source, target) in ctx.cuts:
            y[:, target].addcmul_(x[:, source], taps[tap])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        taps = weight.to(grad.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * taps[0]
            for tap, (source, target) in ctx.cuts:
                grad_x[:, source].addcmul_(grad[:, target], taps[tap])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            grad_weight[0] = (grad * x).sum((0, 1), dtype=weight.dtype)
            for tap, (source, target) in ctx.cuts:
                grad_weight[tap] = (grad[:, target] * x[:, source]).sum((0, 1), dtype=weight.dtype)
        return grad_x, grad_weight, None


def short_conv(
    x_BTD: Tensor, weight_KD: Tensor, same: list[Tensor] | None = None, *, both_ways: bool = False
) -> Tensor:
    """Convolve along the tokens. x [B, T, D], weight [K, D] -> [B, T, D] in x's dtype.

    The taps are those of `lags_of`. `same`, one [B, T, 1] per distance 1 .. , cuts the convolution where a new document
    begins.
    """
    if same is None and not torch.compiler.is_compiling():
        return _ShortConv.apply(x_BTD, weight_KD, both_ways)
    return short_conv_reference(x_BTD, weight_KD.to(x_BTD.dtype), same, both_ways)
