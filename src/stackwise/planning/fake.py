"""Tensors without storage that take the routes of a device, present or not.

On them the real modules, losses and optimizers run as they are. They claim to be on the CPU, since autograd and
autocast work for devices this PyTorch was built for only; `kernels.device` sends them the way of the device that is
planned for. Two of PyTorch's own operations choose their kernel by device, out of reach from here: for other devices
than the CPU they are replaced by stand-ins that make and keep the tensors which the kernels there make and keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from stackwise.kernels.device import counted_as
from stackwise.kernels.product import _onednn
from stackwise.kernels.rms_norm import compute_dtype
from stackwise.kernels.rotary import rotary_table
from stackwise.planning.recall import Recall

NARROW = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256


@contextmanager
def fake_tensors(kind: str) -> Iterator[None]:
    """Inside, new tensors have no storage, and operations on them take the routes of a `kind` of device: cpu, cuda."""
    _onednn()  # asks the processor by a product of real numbers
    rotary_table.cache_clear()
    with ExitStack() as stack:
        stack.enter_context(counted_as(kind))
        stack.enter_context(Recall(stack.enter_context(FakeTensorMode())))
        if kind != "cpu":
            stack.enter_context(_replaced(_STAND_INS))
        # Tables made inside have no numbers, so they must not outlive it.
        stack.callback(rotary_table.cache_clear)
        yield


def without_storage(module: nn.Module) -> nn.Module:
    """The module, built on the meta device, with tensors of the surrounding `fake_tensors`; in place."""
    return module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))


@contextmanager
def _replaced(stand_ins: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, functions of `torch.nn.functional` are others, in passes that are computed again too.

    A mode that catches function calls would be off while gradients are computed.
    """
    before = {name: getattr(F, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(F, name, stand_in)
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as CUDA runs it.

    Without a mask a flash kernel takes bf16 and fp16, and with a mask cuDNN's; other numbers and masks go to the
    memory-efficient kernel, which wants as many key heads as query heads. What none of them takes is computed in full.
    """
    dtype = compute_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    narrow = dtype in NARROW and q.shape[-1] <= WIDEST_HEAD and v.dtype == dtype
    if narrow or (dtype == torch.float32 and k.shape[1] == q.shape[1]):
        return _FusedAttention.apply(q, k, v, mask if mask is None else _as_bias(mask, dtype))
    return torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Kernels that take a mask take it as numbers to add."""
    return mask if mask.dtype != torch.bool else torch.empty(mask.shape, dtype=dtype, device=mask.device)


class _FusedAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and one fp32 number per query and head (Dao et al. 2022, arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        # fp32 sums of dq, row sums, and, where query heads share keys, a gradient of the keys per query head
        sums = [q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:-1], dtype=torch.float32)]
        if k.shape[1] != q.shape[1]:
            sums += [k.new_empty(*q.shape[:2], *k.shape[2:]), v.new_empty(*q.shape[:2], *v.shape[2:])]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del sums
        return *grads, None


def _rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps its input, its weight and one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            torch.empty_like(x) if needs_x else None,
            torch.empty_like(weight) if needs_weight else None,
        )


_STAND_INS: dict[str, Callable[..., Tensor]] = {
    "scaled_dot_product_attention": _attention,
    "rms_norm": _rms_norm,
}
