"""Head and cross-entropy in one operation that never holds all logits.

loss = sum over valid rows of logsumexp(h W^T) - (h W^T)[label]

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

from stackwise.kernels.rms_norm import compute_dtype

IGNORE = -100
CHUNK_BYTES = 256 * 2**20  # fp32 logits of one chunk


def chunk_rows(vocab_size: int, limit_bytes: int = CHUNK_BYTES) -> int:
    """How many rows of fp32 logits fit into `limit_bytes` (at least one)."""
    return max(1, limit_bytes // (4 * vocab_size))


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The plain form: all logits at once. hidden [N, D], weight [V, D], labels [N] -> scalar sum."""
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        narrow = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows].to(dtype)
            target = labels[start : start + rows]
            valid = target != IGNORE
            index = target.clamp_min(0).unsqueeze(-1)
            log_p = torch.log_softmax(torch.mm(part, narrow.t()).to(wide), dim=-1)
            total -= (log_p.gather(-1, index).squeeze(-1) * valid).sum()
            if not (needs_hidden or needs_weight):
                continue
            slope = log_p.exp_()  # d loss / d logits = softmax - one hot, zero where ignored
            slope.scatter_add_(-1, index, torch.full_like(index, -1, dtype=wide))
            slope = slope.mul_(valid.unsqueeze(-1)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = torch.mm(slope, narrow)
            if needs_weight:
                share = torch.mm(slope.t(), part).to(weight.dtype)
                grad_weight = share if grad_weight is None else grad_weight.add_(share)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, rows_per_chunk: int | None = None
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `labels`, in nats.

    hidden [N, D], weight [V, D], labels int64 [N] with -100 = no target -> scalar in fp32 (fp64 for fp64 inputs).
    `rows_per_chunk` null keeps the fp32 logits of a chunk under 256 MiB. Products run in autocast's dtype when it is
    on; the softmax is always fp32 or wider.
    """
    rows = rows_per_chunk or chunk_rows(weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, rows, compute_dtype(hidden))
