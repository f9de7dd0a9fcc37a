"""Attention by kernels: queries and keys are compared by their distance, or in time linear in the length.

With x~ = x / U^(1/4), U the width of a query, and d = q~ - k~:

| kind      | kappa                                | rows of W (random Fourier features)              |
|-----------|--------------------------------------|--------------------------------------------------|
| gaussian  | exp(-|d|^2 / 2 s^2)                  | N(0, I / s^2)                                    |
| laplacian | exp(-|d|_2 / s), l1: exp(-|d|_1 / s) | g / (|g0| s), normal g and g0; l1: Cauchy / s    |
| uniform   | product of sin(d_i / s) / (d_i / s)  | U[-1/s, 1/s]                                     |

score   softmax_j(b_h phi(q_i) phi(k_j)), phi(x) = sqrt(2/D) cos(W x~ + c), c ~ U[0, 2 pi), so that the mean of
        phi(q) phi(k) is kappa (Rahimi and Recht 2007). b_h = sqrt(D) beta_h, beta learned per head, starts at 1.
exact   the same with kappa itself, for comparison; it holds all pairs of tokens at once.
linear  psi(q_i) psi(k_j) / sum_j, never built: see `linear_time`. psi(x) = exp(W y - |y|^2), W ~ N(0, I), y = x~ / s,
        for gaussian; exp(W x~ - |x~|^2 / 2) for the softmax kernel exp(q~ k~), which is kind linear
        (Choromanski et al. 2020, arXiv 2009.14794). Attention weights are never there, so dropout leaves them alone.

W and c are buffers, drawn once from the seed and the block's name and saved with it. A block that starts as a copy of
another takes its buffers over, for the projections have learned to go with them.

Shape letters: B batch, T new tokens, S seen tokens, N heads, G key-value heads, U query width, V value width, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stackwise.kernels.rms_norm import compute_dtype
from stackwise.model.attention.core import attend_widths
from stackwise.model.attention.linear_time import linear_attention
from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import BlockCache, KeyValueCache, StateCache
from stackwise.model.parts import KernelSpec
from stackwise.model.visibility import Mask, Visibility

HIGHEST = 100.0
"""Bound on the frequencies of the laplacian kernels, whose distribution has no mean: one in a hundred lies above. They
tell apart what is nearer than 1/100 of the bandwidth, where they would see rounding errors as well."""


class Kernel(nn.Module):
    """Stands in the place of softmax(q k / sqrt(U)) v, behind the projections of a block."""

    features: Tensor
    phases: Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        assert spec.kernel is not None
        self.kernel, self.sight, self.softcap = spec.kernel, spec.sight, spec.softcap
        self.n_heads, self.n_kv_heads = spec.n_heads, spec.n_kv_heads
        self.width, self.value_width = spec.query_key_width, spec.value_width
        count = self.kernel.features
        if self.is_linear:
            self.register_buffer("features", torch.zeros(count, self.width))
        else:
            self.beta = nn.Parameter(torch.ones(self.n_heads))
            if self.kernel.mode == "score":
                self.register_buffer("features", torch.zeros(count, self.width))
                self.register_buffer("phases", torch.zeros(count))

    @property
    def is_linear(self) -> bool:
        """Whether it works in linear time."""
        return self.kernel.mode == "linear"

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Give the buffers their random values. Nothing to do for the exact kernel and on the meta device."""
        if self.kernel.mode == "exact" or self.features.is_meta:
            return
        self.features.copy_(random_rows(self.kernel, self.width, generator))
        if self.kernel.mode == "score":
            self.phases.copy_(2 * math.pi * torch.rand(self.phases.shape, generator=generator))

    def forward(
        self,
        q_BNTU: Tensor,
        k_BGTU: Tensor,
        v_BGTV: Tensor,
        visibility: Visibility,
        cache: BlockCache | None,
        dropout: float,
    ) -> Tensor:
        """-> [B, N, T, V]. With a `cache` keys and values are those of the new tokens, else of all that are seen."""
        if self.is_linear:
            assert cache is None or isinstance(cache, StateCache)
            q, k = self.log_features(q_BNTU), self.log_features(k_BGTU)
            return linear_attention(q, k, v_BGTV, visibility, self.sight[0], cache)
        k_BGTU = self.phi(k_BGTU) if self.kernel.mode == "score" else k_BGTU
        if cache is not None:
            assert isinstance(cache, KeyValueCache)
            k_BGTU, v_BGTV = cache.update(k_BGTU, v_BGTV)
        mask, root = visibility.mask(*self.sight, dtype=v_BGTV.dtype), math.sqrt(self.kernel.features)
        if self.kernel.mode == "exact":
            return self._exact(q_BNTU, k_BGTU, v_BGTV, mask, dropout, root)
        q = self.phi(q_BNTU) * self.beta.to(v_BGTV.dtype)[:, None, None]
        return attend_widths(q, k_BGTU, v_BGTV, mask, dropout, root, self.softcap)

    def phi(self, x: Tensor) -> Tensor:
        """Random Fourier features: [..., U] -> [..., D], in the dtype that x computes in."""
        with torch.autocast(x.device.type, enabled=False):
            wide = self._wide(x)
            angles = torch.nn.functional.linear(
                wide * self.width**-0.25, self.features.to(wide.dtype), self.phases.to(wide.dtype)
            )
            return (math.sqrt(2 / self.kernel.features) * angles.cos()).to(compute_dtype(x))

    def log_features(self, x: Tensor) -> Tensor:
        """Logarithms of the positive features, but for a constant: [..., U] -> [..., D], fp32 or wider."""
        with torch.autocast(x.device.type, enabled=False):
            gaussian = self.kernel.kind == "gaussian"
            y = self._wide(x) * (self.width**-0.25 / (self.kernel.bandwidth if gaussian else 1.0))
            square = y.square().sum(-1, keepdim=True)
            return y @ self.features.to(y.dtype).mT - (square if gaussian else square / 2)

    def _exact(
        self, q_BNTU: Tensor, k_BGSU: Tensor, v_BGSV: Tensor, mask: Mask, dropout: float, root: float
    ) -> Tensor:
        repeats = self.n_heads // self.n_kv_heads
        k, v = k_BGSU.repeat_interleave(repeats, dim=1), v_BGSV.repeat_interleave(repeats, dim=1)
        with torch.autocast(q_BNTU.device.type, enabled=False):
            q, k = (self._wide(x) * self.width**-0.25 for x in (q_BNTU, k))
            scores = kappa(self.kernel, q, k) * (root * self.beta)[:, None, None]
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask.bias is not None:
            scores = scores + mask.bias
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        seen = mask.visible if mask.visible is not None else seen.tril() if mask.is_causal else seen
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1)
        weights = torch.nn.functional.dropout(weights, dropout, dropout > 0)
        out = weights.to(v.dtype) @ v
        return out if mask.dead is None else out.masked_fill(mask.dead, 0.0)

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> BlockCache:
        """Room for the compared form of the keys and the values of `capacity` tokens; in linear time for their sums."""
        heads, count = self.n_kv_heads, self.kernel.features
        if self.is_linear:
            wide = torch.promote_types(dtype, torch.float32)
            return StateCache(batch, heads, count, self.value_width + 1, wide, device)
        width = count if self.kernel.mode == "score" else self.width
        _, window, sinks, _ = self.sight
        return KeyValueCache(
            batch, heads, capacity, width, dtype, device, window, sinks, value_width=self.value_width
        )

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))


def random_rows(kernel: KernelSpec, width: int, generator: torch.Generator) -> Tensor:
    """The rows W of a kernel's features: fp32 [D, width]."""
    count, scale = kernel.features, 1 / kernel.bandwidth
    normal = torch.randn(count, width, generator=generator)
    if kernel.mode == "linear":
        return normal
    if kernel.kind == "gaussian":
        return normal * scale
    if kernel.kind == "uniform":
        return (2 * torch.rand(count, width, generator=generator) - 1) * scale
    if kernel.norm == "l1":
        return torch.empty(count, width).cauchy_(generator=generator).clamp_(-HIGHEST, HIGHEST) * scale
    return normal / torch.randn(count, 1, generator=generator).abs().clamp_min(1 / HIGHEST) * scale


def kappa(kernel: KernelSpec, q: Tensor, k: Tensor) -> Tensor:
    """The kernel of all pairs of scaled queries [..., T, U] and keys [..., S, U]: [..., T, S]."""
    if kernel.kind == "gaussian":
        return (-torch.cdist(q, k).square() / (2 * kernel.bandwidth**2)).exp()
    if kernel.kind == "laplacian":
        return (-torch.cdist(q, k, p=1.0 if kernel.norm == "l1" else 2.0) / kernel.bandwidth).exp()
    apart = (q.unsqueeze(-2) - k.unsqueeze(-3)) / (math.pi * kernel.bandwidth)
    return apart.sinc().prod(dim=-1)
