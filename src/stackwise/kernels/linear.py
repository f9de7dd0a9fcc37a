"""A linear layer whose fp32 products take the faster route where there is one (see `product`).

y = x W^T + b;   dx = dy W,  dW = dy^T x,  db = sum of dy over rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stackwise.kernels.device import device_kind
from stackwise.kernels.product import prefers_onednn, product
from stackwise.kernels.rms_norm import compute_dtype


def linear_reference(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """PyTorch's own layer."""
    return F.linear(x, weight_OI, bias_O)


def weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """dy^T x -> [O, I]. The route copies a transposed operand, so the narrower one is made that operand."""
    if grad_NO.dtype != torch.float32 or grad_NO.shape[1] <= x_NI.shape[1]:
        return product(grad_NO.t(), x_NI.t())
    return product(x_NI.t(), grad_NO.t()).t().contiguous()


class _Linear(torch.autograd.Function):
    """Holds `x` in the dtype of the product, and the weight itself: where that has another dtype it is converted again
    when the gradient needs it, which takes little time, where keeping the copies would take half the memory of the model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.bias_dtype = dtype, weight.dtype if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        bias = bias if bias is None else bias.to(dtype)
        return product(x.reshape(-1, x.shape[-1]), weight.to(dtype), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = product(rows, weight.to(ctx.dtype).t()).view(x.shape)
        if needs_weight:
            grad_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if needs_bias:
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] or null -> [..., O], in autocast's dtype or else x's.

    The weight may have another dtype, as one kept in bf16 has where everything else is fp32.
    """
    columns, inner = weight_OI.shape
    dtype = compute_dtype(x)
    other = weight_OI.dtype != dtype
    faster = dtype == torch.bfloat16 or prefers_onednn(x.numel() // inner, inner, columns, x, weight_OI)
    if (faster or other) and device_kind(x) == "cpu" and not torch.compiler.is_compiling():
        return _Linear.apply(x, weight_OI, bias_O, dtype)
    if other and not torch.is_autocast_enabled(x.device.type):
        weight_OI, bias_O = weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype)
    return F.linear(x, weight_OI, bias_O)
