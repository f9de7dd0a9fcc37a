"""Multi-head attention with grouped or single key-value heads, on PyTorch's scaled dot-product attention.

Shape letters: B batch, T new tokens, S seen tokens, D model width, N heads, H head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise.kernels.rotary import rotary_table, rotate
from stackwise.model.attention.core import attend
from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import BlockCache, KeyValueCache
from stackwise.model.linear import Linear
from stackwise.model.norms import RMSNorm
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
        self.q = Linear(spec.d_model, spec.d_model, bias=spec.bias)
        self.k = Linear(spec.d_model, kv_width, bias=spec.bias)
        self.v = Linear(spec.d_model, kv_width, bias=spec.bias)
        self.o = Linear(spec.d_model, spec.d_model, bias=spec.bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.n_kv_heads, self.head_dim, self.causal = spec.n_kv_heads, spec.head_dim, spec.causal
        self.rope_theta, self.dropout = spec.rope_theta, spec.dropout

    def forward(self, x_BTD: Tensor, context: Context, cache: BlockCache | None = None) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q(x_BTD).unflatten(-1, heads)
        k = self.k(x_BTD).unflatten(-1, heads)
        v = self.v(x_BTD).unflatten(-1, heads).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            factors = self._factors(context, x_BTD)
            q, k = rotate(q, factors), rotate(k, factors)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if cache is not None:
            assert isinstance(cache, KeyValueCache)
            k, v = cache.update(k, v)
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, context.visibility.mask(self.causal), dropout)
        return self.o(out.transpose(1, 2).flatten(-2))

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> BlockCache:
        """Room for the keys and values of `capacity` tokens."""
        return KeyValueCache(batch, self.n_kv_heads, capacity, self.head_dim, dtype, device)

    def _factors(self, context: Context, x_BTD: Tensor) -> Tensor:
        """Rotation factors of the positions of this pass: [T, H/2], or [B, T, H/2] with position ids."""
        assert self.rope_theta is not None
        wide = x_BTD.dtype == torch.float64
        table = rotary_table(self.head_dim, self.rope_theta, context.max_seq_len, x_BTD.device, wide)
        if context.position_ids is not None:
            return table[context.position_ids]
        past = context.visibility.past
        return table[past : past + x_BTD.shape[1]]
