"""Short causal depthwise convolution along the tokens, with its gradient written by hand.

y_t = sum_j w_j * x_{t-j}, j = 0 .. K-1   (as before the mixers of So et al. 2021, arXiv 2109.08668)

PyTorch's depthwise convolution is slow for a handful of taps on a CPU and wants channels first; shifted products need
neither. Tokens before the first count as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def short_conv_reference(x_BTD: Tensor, weight_KD: Tensor, same: list[Tensor] | None = None) -> Tensor:
    """The formula, by autograd. `same[j - 1]` [B, T, 1] says where token t - j may be seen from token t."""
    length = x_BTD.shape[1]
    y_BTD = x_BTD * weight_KD[0]
    for lag in range(1, min(weight_KD.shape[0], length)):
        shifted = torch.nn.functional.pad(x_BTD[:, : length - lag], (0, 0, lag, 0)) * weight_KD[lag]
        y_BTD = y_BTD + (shifted if same is None else shifted * same[lag - 1])
    return y_BTD


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        taps = weight.to(x.dtype)
        y = x * taps[0]
        for lag in range(1, min(weight.shape[0], x.shape[1])):
            y[:, lag:].addcmul_(x[:, :-lag], taps[lag])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        taps = weight.to(grad.dtype)
        lags = range(1, min(weight.shape[0], x.shape[1]))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * taps[0]
            for lag in lags:
                grad_x[:, :-lag].addcmul_(grad[:, lag:], taps[lag])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            grad_weight[0] = (grad * x).sum((0, 1), dtype=weight.dtype)
            for lag in lags:
                grad_weight[lag] = (grad[:, lag:] * x[:, :-lag]).sum((0, 1), dtype=weight.dtype)
        return grad_x, grad_weight


def short_conv(x_BTD: Tensor, weight_KD: Tensor, same: list[Tensor] | None = None) -> Tensor:
    """Convolve along the tokens. x [B, T, D], weight [K, D] -> [B, T, D] in x's dtype.

    `same`, one [B, T, 1] per lag 1 .. K-1, cuts the convolution where a new document or padding begins.
    """
    if same is None and not torch.compiler.is_compiling():
        return _ShortConv.apply(x_BTD, weight_KD)
    return short_conv_reference(x_BTD, weight_KD.to(x_BTD.dtype), same)
