"""Attention whose weights are products of positive features, in time linear in the length.

    out_i = sum_j psi(q_i) psi(k_j) v_j / sum_j psi(q_i) psi(k_j)
          = psi(q_i) S_i / psi(q_i) z_i,     S_i = sum_j psi(k_j) v_j^T,  z_i = sum_j psi(k_j)   over the visible j

(Katharopoulos et al. 2020, arXiv 2006.16236). z goes along as one more column of S. Causal attention takes chunks:
weights inside of a chunk, the sum S of all before it outside; S is also the cache of decoding, of constant size.

psi comes as logarithms, and whatever shifts them cancels. Each query is shifted by its largest feature. Sums are kept
relative to the largest key feature in them, and those of a query to that of the keys it sees: a maximum over all keys
would let later tokens, and other documents, into the last digits. Shifts need no gradient.

Documents are runs of tokens with the same id: a sum starts anew where one begins. Where tokens see both ways in
documents, what lies before and what lies after are summed apart.

Shape letters: B batch, T tokens, C tokens of a chunk, N heads, G key-value heads, R = N/G, D features, V value width + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackwise.model.attention_flops import CHUNK
from stackwise.model.cache import StateCache
from stackwise.model.visibility import Visibility

TINY = 1e-30
"""Added to the sum of weights: a token that sees nothing gives 0."""


def linear_attention(
    q_BNTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    visibility: Visibility,
    causal: bool,
    cache: StateCache | None,
) -> Tensor:
    """q, k: logarithms of features, fp32 or wider -> [B, N, T, V] in v's dtype. The cache takes up the new tokens."""
    with torch.autocast(v_BGTV.device.type, enabled=False):
        q = (q_BNTD - q_BNTD.detach().amax(-1, keepdim=True)).exp().unflatten(1, (k_BGTD.shape[1], -1))
        top = k_BGTD.detach().amax(-1)  # [B, G, T]
        k = (k_BGTD - top.unsqueeze(-1)).exp()
        v = torch.cat((v_BGTV.to(k.dtype), torch.ones_like(top).unsqueeze(-1)), dim=-1)
        padding, documents = visibility.padding, visibility.documents
        if padding is not None:
            top = top.masked_fill(~padding[:, None, visibility.past :], -torch.inf)
        state = _State.empty(k, v) if cache is None else _State(cache.sums, cache.top)
        if causal:
            sums, _ = _prefix(q, k, v, top, documents, state)
        elif documents is None:
            state.add(k, v, top)
            sums = q @ state.sums.unsqueeze(2)
        else:
            sums = _both_ways(q, k, v, top, documents)
        if cache is not None:
            cache.hold(state.sums, state.top, q.shape[-2])
        out = sums[..., :-1] / (sums[..., -1:] + TINY)
    return out.flatten(1, 2).to(v_BGTV.dtype)


class _State:
    """sums [B, G, D, V] of the keys so far, times exp(-top); top [B, G], -inf while there are none."""

    def __init__(self, sums: Tensor, top: Tensor) -> None:
        self.sums, self.top = sums, top

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> _State:
        batch, heads, _, count = k.shape
        return cls(k.new_zeros(batch, heads, count, v.shape[-1]), k.new_full((batch, heads), -torch.inf))

    def add(self, k: Tensor, v: Tensor, top: Tensor, keep: Tensor | None = None) -> None:
        """Take up keys [B, G, C, D] with their tops [B, G, C]. `keep` bool [B]: where what was held stays."""
        held = self.top if keep is None else self.top.masked_fill(~keep[:, None], -torch.inf)
        highest = torch.maximum(held, top.amax(-1))
        base = _finite(highest)
        k = k * (top - base.unsqueeze(-1)).exp().unsqueeze(-1)
        self.sums = self.sums * (held - base).exp()[..., None, None] + k.mT @ v
        self.top = highest


def _finite(top: Tensor) -> Tensor:
    return top.masked_fill(top == -torch.inf, 0.0)


def _prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top: Tensor,
    documents: Tensor | None,
    state: _State,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums [B, G, R, T, V] over the tokens up to each (`strict`: before it), and what they are relative to [B, G, T].

    `state` holds the tokens before and takes up these.
    """
    sums, tops = [], []
    last: Tensor | None = None  # document of the token before the chunk
    # split, not slices: the gradient of each slice would be as long as the row
    chunks = zip(*(x.split(CHUNK, dim=-2) for x in (q, k, v, top.unsqueeze(-1))), strict=True)
    ids_of = None if documents is None else documents.split(CHUNK, dim=-1)
    for i, (q_c, k_c, v_c, top_c) in enumerate(chunks):
        top_c = top_c.squeeze(-1)
        size = top_c.shape[-1]
        seen = torch.ones(1, 1, size, size, dtype=torch.bool, device=q.device).tril(-1 if strict else 0)
        held, keep, kept = state.top.unsqueeze(-1).expand(-1, -1, size), None, top_c
        if ids_of is not None:
            ids = ids_of[i]
            seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
            kept = top_c.masked_fill((ids != ids[:, -1:])[:, None], -torch.inf)
            if last is not None:
                held = held.masked_fill((ids != last)[:, None], -torch.inf)
                keep = ids[:, -1] == last[:, 0]
            last = ids[:, -1:]
        inside = top_c.unsqueeze(-2).masked_fill(~seen, -torch.inf)  # [B, G, C, C]
        highest = torch.maximum(held, inside.amax(-1))
        base = _finite(highest)
        weights = (q_c @ k_c.mT.unsqueeze(2)) * (inside - base.unsqueeze(-1)).exp().unsqueeze(2)
        before = (held - base).exp()[:, :, None, :, None]
        sums.append(weights @ v_c.unsqueeze(2) + (q_c @ state.sums.unsqueeze(2)) * before)
        tops.append(highest)
        state.add(k_c, v_c, kept, keep)
    return torch.cat(sums, dim=-2), torch.cat(tops, dim=-1)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, top: Tensor, documents: Tensor) -> Tensor:
    """Sums over all tokens of each token's document: those up to it, and, from the other end, those behind it."""
    sums, tops = _prefix(q, k, v, top, documents, _State.empty(k, v))
    behind, high = _prefix(
        q.flip(-2), k.flip(-2), v.flip(-2), top.flip(-1), documents.flip(-1), _State.empty(k, v), strict=True
    )
    behind, high = behind.flip(-2), high.flip(-1)
    base = _finite(torch.maximum(tops, high))
    return sums * (tops - base).exp()[:, :, None, :, None] + behind * (high - base).exp()[:, :, None, :, None]
