"""Multi-head attention with grouped or single key-value heads, on PyTorch's scaled dot-product attention.

Shape letters: B batch, T new tokens, S seen tokens, D model width, N heads, H head width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise.kernels.rotary import rotate
from stackwise.model.attention.core import attend
from stackwise.model.attention.kernel import Kernel
from stackwise.model.attention.rotary import Rotary
from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import BlockCache, KeyValueCache
from stackwise.model.linear import Linear
from stackwise.model.norms import rms_norm_like
from stackwise.model.registry import ATTENTIONS

if TYPE_CHECKING:
    from stackwise.model.block import Context


@ATTENTIONS.register("mha")
class Attention(nn.Module):
    """q, k, v of N and N_kv heads, rotated inside; key-value head j serves query heads j*N/N_kv onwards.

    N_kv = N is multi-head, 1 is multi-query, anything between is grouped-query attention (Ainslie et al. 2023,
    arXiv 2305.13245).
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        kv_width = spec.n_kv_heads * spec.head_dim
        self.q = Linear(spec.d_model, spec.query_width, bias=spec.qkv_bias)
        self.k = Linear(spec.d_model, kv_width, bias=spec.qkv_bias)
        self.v = Linear(spec.d_model, kv_width, bias=spec.qkv_bias)
        self.o = Linear(spec.query_width, spec.d_model, bias=spec.out_bias)
        make_norm = rms_norm_like(spec.norm)
        self.q_norm = make_norm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = make_norm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.kernel = Kernel(spec) if spec.kernel is not None else None
        self.n_kv_heads, self.head_dim, self.causal = spec.n_kv_heads, spec.head_dim, spec.causal
        self.sight, self.window, self.sinks, self.softcap = spec.sight, spec.window, spec.sinks, spec.softcap
        # the kernels divide by sqrt(H)
        own = spec.score_width not in (None, spec.head_dim)
        self.stretch = math.sqrt(spec.head_dim) * spec.score_scale if own else 1.0
        self.rotary, self.dropout = Rotary.of(spec, spec.head_dim), spec.dropout

    def forward(self, x_BTD: Tensor, context: Context, cache: BlockCache | None = None) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q(x_BTD).unflatten(-1, heads)
        k = self.k(x_BTD).unflatten(-1, heads)
        v = self.v(x_BTD).unflatten(-1, heads).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            factors = self.rotary.factors(context, x_BTD)
            q, k = rotate(q, factors), rotate(k, factors)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if self.kernel is not None:
            dropout = self.dropout if self.training else 0.0
            out = self.kernel(q, k, v, context.visibility, cache, dropout)
            return self.o(out.transpose(1, 2).flatten(-2))
        if cache is not None:
            assert isinstance(cache, KeyValueCache)
            k, v = cache.update(k, v)
        if self.stretch != 1.0:
            q = q * self.stretch
        dropout = self.dropout if self.training else 0.0
        mask = context.visibility.mask(*self.sight, dtype=q.dtype)
        out = attend(q, k, v, mask, dropout, self.softcap)
        return self.o(out.transpose(1, 2).flatten(-2))

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> BlockCache:
        """Room for the keys and values of `capacity` tokens, or of those that a window shows."""
        if self.kernel is not None:
            return self.kernel.make_cache(batch, capacity, dtype, device)
        width, window, sinks = self.head_dim, self.window, self.sinks
        return KeyValueCache(batch, self.n_kv_heads, capacity, width, dtype, device, window, sinks)
