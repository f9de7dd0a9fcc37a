"""Multi-head latent attention (DeepSeek-V2: Liu et al. 2024, arXiv 2405.04434).

    c_q = RMSNorm(q_down x)                  the latent of the queries; without it q = W_q x
    c, k_R = kv_down x;  c = RMSNorm(c)      the latent that keys and values share, and one rotary key for all heads
    q_C, q_R = q_up c_q;  k_C, v = kv_up c   per head
    scores = scale (q_C k_C + RoPE(q_R) RoPE(k_R)) / sqrt(nope + rope)

The cache holds c and the rotated k_R alone. A few new tokens over many held ones never build keys and values: kv_up is
absorbed, its key half into the queries and its value half behind the weighted sum,

    q_C k_C = (W_uk^T q_C) c          sum_j p_j v_j = W_uv (sum_j p_j c_j)

which makes it attention with a single key-value head over the latents. A rotation between W_uk and c would forbid that,
hence the rotary numbers of their own. Latents are normalised, heads are not, for the same reason. kv_up and q_up have
no bias, as in DeepSeek's models: one on keys shifts all scores of a query alike, one on values is a constant.

With a kernel (laplacian and fewer key-value heads: MLGKA) the heads [q_C; q_R] and [k_C; k_R] meet in it. Its features
are not linear in the latent, so nothing is absorbed: the cache holds the latents all the same, and keys are built anew.

Shape letters: B batch, T new tokens, S seen tokens, D model width, N heads, G key-value heads, C latent and rotary width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise.kernels.rotary import rotate
from stackwise.model.attention.core import attend_widths
from stackwise.model.attention.kernel import Kernel
from stackwise.model.attention.rotary import Rotary
from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import BlockCache, LatentCache
from stackwise.model.linear import Linear, matrix_of
from stackwise.model.norms import rms_norm_like
from stackwise.model.registry import ATTENTIONS
from stackwise.model.visibility import Mask

if TYPE_CHECKING:
    from stackwise.model.block import Context

FEW = 16
"""New tokens up to which absorption is considered; it holds all their scores at once."""


@ATTENTIONS.register("mla")
class LatentAttention(nn.Module):
    """Keys and values of G heads from one latent; key-value head j serves query heads j N/G onwards."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        latent = spec.latent
        assert latent is not None
        self.latent, self.n_heads, self.n_kv_heads = latent, spec.n_heads, spec.n_kv_heads
        self.nope, self.value = spec.query_key_width - latent.rope_dim, spec.value_width
        make_norm = rms_norm_like(spec.norm)
        query = spec.n_heads * (self.nope + latent.rope_dim)
        self.q = self.q_down = self.q_norm = self.q_up = None
        if latent.q_rank:
            self.q_down = Linear(spec.d_model, latent.q_rank, bias=spec.qkv_bias)
            self.q_norm = make_norm(latent.q_rank, spec.norm_eps)
            self.q_up = Linear(latent.q_rank, query, bias=False)
        else:
            self.q = Linear(spec.d_model, query, bias=spec.qkv_bias)
        self.kv_down = Linear(spec.d_model, latent.cached, bias=spec.qkv_bias)
        self.kv_norm = make_norm(latent.kv_rank, spec.norm_eps)
        self.kv_up = Linear(latent.kv_rank, spec.n_kv_heads * (self.nope + self.value), bias=False)
        self.o = Linear(spec.n_heads * self.value, spec.d_model, bias=spec.out_bias)
        self.scale = latent.scale * (self.nope + latent.rope_dim) ** -0.5
        self.kernel = Kernel(spec) if spec.kernel is not None else None
        self.rotary = Rotary.of(spec, latent.rope_dim)
        self.sight, self.softcap, self.dropout = spec.sight, spec.softcap, spec.dropout

    def forward(self, x_BTD: Tensor, context: Context, cache: BlockCache | None = None) -> Tensor:
        q_BTNH, held_BSC = self._project(x_BTD, context)
        dropout = self.dropout if self.training else 0.0
        if self.kernel is not None:
            if isinstance(cache, LatentCache):
                held_BSC, cache = cache.update(held_BSC), None
            out = self.kernel(
                q_BTNH.transpose(1, 2), *self._keys_values(held_BSC), context.visibility, cache, dropout
            )
            return self.o(out.transpose(1, 2).flatten(-2))
        mask = context.visibility.mask(*self.sight, dtype=q_BTNH.dtype)
        if cache is not None:
            assert isinstance(cache, LatentCache)
            past = cache.length
            held_BSC = cache.update(held_BSC)
            if past and not dropout and self.absorbs(x_BTD.shape[1], held_BSC.shape[1]):
                matrix = matrix_of(self.kv_up)
                if matrix is not None:  # with adapters on it the layer has no matrix of its own
                    return self.o(self._absorbed(q_BTNH, held_BSC, matrix, mask).flatten(-2))
        k, v = self._keys_values(held_BSC)
        out = attend_widths(q_BTNH.transpose(1, 2), k, v, mask, dropout, self.scale, self.softcap)
        return self.o(out.transpose(1, 2).flatten(-2))

    def _project(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Queries [B, T, N, nope + rope], and what is held of each token [B, T, C]; both rotated."""
        if self.q is not None:
            q = self.q(x_BTD)
        else:
            assert self.q_down is not None
            assert self.q_norm is not None
            assert self.q_up is not None
            q = self.q_up(self.q_norm(self.q_down(x_BTD)))
        q = q.unflatten(-1, (self.n_heads, -1))
        held, rank = self.kv_down(x_BTD), self.latent.kv_rank
        c = self.kv_norm(held[..., :rank])
        if self.rotary is None:
            return q, c
        factors = self.rotary.factors(context, x_BTD)
        # contiguous, for pairs become complex numbers only where they lie at even places
        turned = rotate(q[..., self.nope :].contiguous(), factors)
        key = rotate(held[..., None, rank:].contiguous(), factors).squeeze(-2)
        return torch.cat((q[..., : self.nope], turned), dim=-1), torch.cat((c, key.to(c.dtype)), dim=-1)

    def _keys_values(self, held_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, G, S, nope + rope] and values [B, G, S, value] of the tokens held."""
        rank, rope = self.latent.kv_rank, self.latent.rope_dim
        up = self.kv_up(held_BSC[..., :rank]).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        k, v = up[..., : self.nope], up[..., self.nope :]
        if not rope:
            return k, v
        turned = held_BSC[:, None, :, rank:].expand(-1, self.n_kv_heads, -1, -1)
        return torch.cat((k, turned.to(k.dtype)), dim=-1), v

    def absorbs(self, new: int, seen: int) -> bool:
        """Whether absorbing is less work for `new` tokens than building keys and values of all that are seen."""
        rank, rope, heads = self.latent.kv_rank, self.latent.rope_dim, self.n_heads
        each = rank * (self.nope + self.value)
        plain = seen * self.n_kv_heads * each + new * seen * heads * (self.nope + rope + self.value)
        return new <= FEW and new * heads * (each + seen * (2 * rank + rope)) < plain

    def _absorbed(self, q_BTNH: Tensor, held_BSC: Tensor, matrix: Tensor, mask: Mask) -> Tensor:
        """What the plain form gives, [B, T, N, value]; `matrix` [G (nope + value), rank] is that of kv_up."""
        batch, new, rank = q_BTNH.shape[0], q_BTNH.shape[1], self.latent.kv_rank
        up = matrix.to(q_BTNH.dtype).view(self.n_kv_heads, -1, rank)
        q = self._per_head(q_BTNH[..., : self.nope], up[:, : self.nope])
        q = torch.cat((q, q_BTNH[..., self.nope :].flatten(0, 1)), dim=-1) * self.scale
        held_BSC = held_BSC.to(q.dtype)
        scores = torch.bmm(q.view(batch, new * self.n_heads, -1), held_BSC.mT)
        scores = scores.view(batch, new, self.n_heads, -1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask.bias is not None:
            scores = scores + mask.bias.transpose(1, 2)
        if mask.visible is not None:
            scores = scores.masked_fill(~mask.visible.transpose(1, 2), torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).to(held_BSC.dtype).flatten(1, 2)
        mixed = torch.bmm(weights, held_BSC[..., :rank]).view(batch, new, self.n_heads, rank)
        out = self._per_head(mixed, up[:, self.nope :].mT).unflatten(0, (batch, new))
        return out if mask.dead is None else out.masked_fill(mask.dead.transpose(1, 2), 0.0)

    def _per_head(self, x_BTNI: Tensor, matrices_GIO: Tensor) -> Tensor:
        """Each head's numbers times the matrix of its key-value head: [B T, N, O]."""
        groups, rows = self.n_kv_heads, x_BTNI.shape[0] * x_BTNI.shape[1]
        x = x_BTNI.reshape(rows, groups, self.n_heads // groups, -1).transpose(0, 1).flatten(1, 2)
        y = torch.bmm(x, matrices_GIO).unflatten(1, (rows, -1)).transpose(0, 1)
        return y.reshape(rows, self.n_heads, -1)

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> BlockCache:
        """Room for latents and rotary keys of `capacity` tokens, or of those in a window; in linear time for sums alone."""
        if self.kernel is not None and self.kernel.is_linear:
            return self.kernel.make_cache(batch, capacity, dtype, device)
        _, window, sinks, _ = self.sight
        return LatentCache(batch, capacity, self.latent.cached, dtype, device, window, sinks)
