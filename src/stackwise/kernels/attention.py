"""Scaled dot-product attention: PyTorch's own, and a blocked form for bf16 on the CPU.

out = softmax(q k^T / sqrt(H)) v over the visible keys

PyTorch's CPU kernel works through bf16 in small pieces; whole blocks of scores in the bf16 products that the processor
has take half of its time forward and a third to a tenth of it backward. A block of queries needs only the keys up to
its end when attention is causal. The backward pass computes the probabilities again, so that no score outlives its
block (Dao et al. 2022, arXiv 2205.14135).

Shape letters: B batch, T queries, S keys, N heads, K key-value heads, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stackwise.kernels.device import device_kind

QUERIES = 128  # queries of one block
BLOCK_NUMBERS = 2**19  # scores of one block: 1 MiB, the size of a core's second-level cache


def attention_reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
    """The formula in the inputs' dtype. q [B, N, T, H], k, v [B, K, S, H], visible bool [B or 1, 1, T, S]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    seen = seen if visible is None else seen & visible
    out = scores.masked_fill(~seen, -math.inf).softmax(dim=-1) @ v
    return out.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)


class _Blocks:
    """The cut of contiguous q [B, N, T, H] and k [B, K, S, H] into blocks of a few rows and up to QUERIES queries.

    The N/K query heads of one key-value head are treated as further queries of that head.
    """

    def __init__(self, q: Tensor, k: Tensor, visible: Tensor | None, causal: bool) -> None:
        self.visible, self.causal = visible, causal
        self.batch, self.heads, self.n_queries, self.width = q.shape
        self.kv_heads, self.n_keys = k.shape[1], k.shape[2]
        self.span = min(QUERIES, self.n_queries) if causal else self.n_queries
        self.scale = 1 / math.sqrt(self.width)
        self.lowest = torch.finfo(q.dtype).min

    def rows(self) -> Iterator[slice]:
        """Slices of the batch."""
        step = max(1, BLOCK_NUMBERS // (self.heads * self.span * self.n_keys))
        for start in range(0, self.batch, step):
            yield slice(start, min(start + step, self.batch))

    def queries(self, last_first: bool = False) -> Iterator[tuple[slice, slice]]:
        """Slices of the queries, each with the keys that it can see."""
        starts = range(0, self.n_queries, self.span)
        for start in reversed(starts) if last_first else starts:
            stop = min(start + self.span, self.n_queries)
            yield slice(start, stop), slice(0, stop if self.causal else self.n_keys)

    def of_queries(self, x_BNTH: Tensor, rows: slice, queries: slice) -> Tensor:
        """One block: [b K, N/K t, H]."""
        return x_BNTH[rows, :, queries].reshape((rows.stop - rows.start) * self.kv_heads, -1, self.width)

    def of_keys(self, x_BKSH: Tensor, rows: slice, keys: slice) -> Tensor:
        """The keys or values of one block: [b K, s, H]."""
        return x_BKSH[rows].flatten(0, 1)[:, keys]

    def probabilities(self, q: Tensor, k: Tensor, rows: slice, queries: slice, keys: slice) -> Tensor:
        """softmax of a block's scores: [b K, N/K t, s]."""
        span, seen = queries.stop - queries.start, keys.stop
        bias, beta = q.new_zeros(()), 0  # adding a bias is several times faster than filling in a mask
        if self.causal and self.visible is None:
            bias, beta = q.new_full((span, seen), self.lowest).triu_(1 + queries.start), 1
            bias = bias.repeat(self.heads // self.kv_heads, 1)
        scores = torch.baddbmm(bias, q, k.mT, alpha=self.scale, beta=beta)
        if self.visible is not None:
            visible = self.visible[rows if self.visible.shape[0] > 1 else slice(None), :, queries, keys]
            bias = q.new_zeros(visible.shape).masked_fill_(~visible, self.lowest)
            scores.view(-1, self.heads, span, seen).add_(bias)
        return torch.softmax(scores, dim=-1)

    def put(self, into_BNTH: Tensor, rows: slice, queries: slice, block: Tensor) -> None:
        """The inverse of `of_queries`."""
        part = into_BNTH[rows, :, queries]
        part.copy_(block.view(part.shape))


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        blocks = ctx.blocks = _Blocks(q, k, visible, causal)
        ctx.save_for_backward(q, k, v)
        out = _tokens_first(q)
        for rows in blocks.rows():
            for queries, keys in blocks.queries():
                q_part, k_part = blocks.of_queries(q, rows, queries), blocks.of_keys(k, rows, keys)
                p = blocks.probabilities(q_part, k_part, rows, queries, keys)
                blocks.put(out, rows, queries, torch.bmm(p, blocks.of_keys(v, rows, keys)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = (_tokens_first(x) for x in (q, k, v))
        for rows in blocks.rows():
            sum_k, sum_v = _Sum(), _Sum()
            for queries, keys in blocks.queries(last_first=True):
                q_part, k_part = blocks.of_queries(q, rows, queries), blocks.of_keys(k, rows, keys)
                g_part = blocks.of_queries(grad, rows, queries)
                p = blocks.probabilities(q_part, k_part, rows, queries, keys)
                slope = torch.bmm(g_part, blocks.of_keys(v, rows, keys).mT)
                slope = torch.ops.aten._softmax_backward_data(slope, p, -1, p.dtype)
                blocks.put(grad_q, rows, queries, torch.bmm(slope, k_part).mul_(blocks.scale))
                sum_k.add(torch.bmm(slope.mT, q_part), keys)
                sum_v.add(torch.bmm(p.mT, g_part), keys)
            grad_k[rows] = sum_k.total.mul_(blocks.scale).view(k[rows].shape)
            grad_v[rows] = sum_v.total.view(v[rows].shape)
        return grad_q, grad_k, grad_v, None, None


class _Sum:
    """A sum over blocks of queries, in fp32 or wider when there are several. The first block spans all keys."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, block: Tensor, keys: slice) -> None:
        if self.count == 0:
            self.total = block
        elif self.count == 1:
            self.total = self.total.to(torch.promote_types(block.dtype, torch.float32))
        if self.count:
            self.total[:, keys] += block
        self.count += 1


def _tokens_first(x_BNTH: Tensor) -> Tensor:
    """An empty tensor of x's shape whose memory runs by token, then head, as the next linear layer reads it."""
    batch, heads, tokens, width = x_BNTH.shape
    return x_BNTH.new_empty(batch, tokens, heads, width).transpose(1, 2)


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    causal: bool,
    dropout: float,
    bias: Tensor | None,
    softcap: float,
) -> Tensor:
    """`attention` whose products are bent to stay within `softcap`; the softmax is fp32 or wider."""
    batch, heads, n_queries, width = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    q = q.reshape(batch, kv_heads, heads // kv_heads * n_queries, width)
    scores = torch.tanh(
        (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / (softcap * math.sqrt(width))
    )
    scores = (softcap * scores).view(batch, heads, n_queries, n_keys)
    if bias is not None:
        scores = scores + bias
    if causal and visible is None:
        visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout)
    return (weights.view(batch, kv_heads, -1, n_keys) @ v).view(batch, heads, n_queries, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [B, N, T, H], k and v [B, K, S, H] -> [B, N, T, H]; key-value head j serves query heads j N/K onwards.

    visible bool [B or 1, 1, T, S], True = seen. `causal` (T = S): query t sees no key after t; a given `visible` says
    so too, and `causal` only spares the work. A query that sees nothing gives something finite, which the caller blanks.
    `bias` [B or 1, N, T, S] in q's dtype is added to the scores in place of `visible`. `softcap` c bends the products:
    c tanh(q k / (c sqrt(H))), before a bias; no fused kernel does that, so all scores are held.
    """
    if softcap is not None:
        return capped_attention(q, k, v, visible, causal, dropout, bias, softcap)
    grouped = k.shape[1] != q.shape[1]
    if bias is not None:  # the blocked form knows masks only
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, False, enable_gqa=grouped)
    blocked = q.dtype == k.dtype == torch.bfloat16 and device_kind(q) == "cpu" and q.shape[2] > 1
    if blocked and dropout == 0.0 and not torch.compiler.is_compiling():
        return _BlockedAttention.apply(q, k, v, visible, causal)
    causal = causal and visible is None
    return F.scaled_dot_product_attention(q, k, v, visible, dropout, causal, enable_gqa=grouped)
