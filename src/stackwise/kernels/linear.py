"""A linear layer whose fp32 products take the faster route where there is one (see `product`).

y = x W^T + b;   dx = dy W,  dW = dy^T x,  db = sum of dy over rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stackwise.kernels.product import prefers_onednn, product


def linear_reference(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """PyTorch's own layer."""
    return F.linear(x, weight_OI, bias_O)


def weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """dy^T x -> [O, I]. The route copies a transposed operand, so the narrower one is made that operand."""
    if grad_NO.shape[1] <= x_NI.shape[1]:
        return product(grad_NO.t(), x_NI.t())
    return product(x_NI.t(), grad_NO.t()).t().contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            product(rows, weight.t()).view(x.shape) if needs_x else None,
            weight_gradient(rows, x.reshape(-1, x.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] or null -> [..., O]."""
    columns, inner = weight_OI.shape
    rows = x.numel() // inner
    if prefers_onednn(rows, inner, columns, x, weight_OI) and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)
