"""Head and cross-entropy in one operation that never holds all logits.

loss = sum over valid rows of weight * (logsumexp(l) - l[label] + z * logsumexp(l)^2),   l = h W^T + b, or c tanh of that / c

Rows are taken in chunks; each chunk's logits live only until its share of the gradients is formed, in the forward
pass. Memory is chunk x V instead of tokens x V, for the same number of matrix products as the plain form. The idea is
that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009) and of the fused linear losses that followed it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stackwise.kernels.device import device_kind
from stackwise.kernels.product import product
from stackwise.kernels.rms_norm import compute_dtype

IGNORE = -100
# Logits of one chunk, by device. On the CPU they should stay in its cache; and the C library of Linux hands blocks of
# 32 MiB and more back to the system after every use.
CHUNK_BYTES = {"cpu": 24 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 128  # fewer make products of matrices too thin to be fast
WIDENED = 2**21  # logits widened to fp32 at a time: 8 MiB


def chunk_rows(vocab_size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> int:
    """Rows of logits taken at a time."""
    limit = CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE)
    return max(FEWEST_ROWS, limit // (dtype.itemsize * vocab_size))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(logits / c): the logits, smoothly kept between -c and c; null: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weights: Tensor | None = None,
    banned: int | None = None,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The plain form: all logits at once; arguments as of `linear_cross_entropy`."""
    logits = F.linear(hidden, weight, bias)
    logits = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    if banned is not None:
        logits = logits.index_fill(-1, torch.tensor([banned], device=logits.device), -torch.inf)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1) ** 2 * (labels != IGNORE)
    return (losses if row_weights is None else losses * row_weights).sum()


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax in the logits' dtype, which may reuse their memory; logsumexp in fp32 or wider), over the last dim."""
    if logits.dtype in (torch.float32, torch.float64):
        p = torch.softmax(logits, dim=-1)
        # The largest probability is at least 1 / V: its logarithm is safe where that of a label's may underflow.
        return p, logits.amax(dim=-1) - p.amax(dim=-1).log_()
    normaliser = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    rows = max(1, WIDENED // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        p, normaliser[part] = _softmax(logits[part].float())
        logits[part] = p
    return logits, normaliser


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_weights: Tensor | None,
        banned: int | None,
        z_loss: float,
        softcap: float | None,
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        narrow = weight.to(dtype)
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None  # transposed: [D, V]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows].to(dtype)
            target = labels[start : start + rows]
            share = (target != IGNORE).to(wide)
            if row_weights is not None:
                share *= row_weights[start : start + rows]
            at_label = (torch.arange(len(part), device=part.device), target.clamp_min(0))
            logits, passed = product(part, narrow), None
            if bias is not None:
                logits += bias
            if softcap is not None:
                logits = logits.div_(softcap).tanh_()
                passed = 1 - logits.square()  # the derivative of c tanh(l / c)
                logits *= softcap
            if banned is not None:
                logits[:, banned] = -torch.inf
            chosen = logits[at_label].to(wide)
            slope, normaliser = _softmax(logits)
            losses = normaliser - chosen
            if z_loss:
                losses = losses + z_loss * normaliser.square()
                slope *= (1 + 2 * z_loss * normaliser).unsqueeze(-1)
            # where ignored the loss may be infinite: a banned token stands in for a label there
            total += torch.where(share == 0, 0, losses * share).sum()
            # d loss / d logits = softmax - one hot, times the row's weight: that is left to the smaller matrices
            slope[at_label] -= 1
            if passed is not None:
                slope *= passed
            if grad_bias is not None:
                grad_bias += share @ slope.to(wide)
            share = share.unsqueeze(-1).to(part.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = product(slope, narrow.t()) * share
            if needs_weight:
                grown = product((part * share).t(), slope.t())
                grad_weight = grown.to(weight.dtype) if grad_weight is None else grad_weight.add_(grown)
        grad_bias = grad_bias if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight if grad_weight is None else grad_weight.t(), grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.clone(memory_format=torch.contiguous_format).mul_(grad)
        if grad_bias is not None:
            grad_bias = grad_bias * grad.to(grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 7


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    row_weights: Tensor | None = None,
    banned: int | None = None,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Summed cross-entropy of `capped(hidden @ weight.T + bias, softcap)` against `labels`, in nats.

    hidden [N, D], weight [V, D], bias [V] or null, labels int64 [N] with -100 = no target -> scalar in fp32 (fp64 for fp64 inputs).
    `row_weights` [N] multiply the losses; null is 1. The token `banned` has probability 0. `z_loss` adds z times the
    squared log-normaliser (Chowdhery et al. 2022, arXiv 2204.02311). `rows_per_chunk` null takes a number that suits
    the device (`chunk_rows`). Products run in autocast's dtype when it is on; the softmax is always fp32 or wider.
    """
    dtype = compute_dtype(hidden)
    rows = rows_per_chunk or chunk_rows(weight.shape[0], dtype, device_kind(hidden))
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, row_weights, banned, z_loss, softcap, rows, dtype
    )
