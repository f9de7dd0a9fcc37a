"""From logits to the next token. Every function is pure; logits are [B, V]."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def penalise_repetition(logits_BV: Tensor, present_BV: Tensor, penalty: float) -> Tensor:
    """Divide the positive logits of tokens already `present` (bool) by `penalty` and multiply the negative ones.

    Keskar et al. 2019, arXiv 1909.05858. A penalty of 1 changes nothing, one below 1 rewards repetition.
    """
    penalised = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(present_BV, penalised, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf everywhere but at the `k` largest logits of each row, and at those equal to the smallest of them."""
    if k >= logits_BV.shape[-1]:
        return logits_BV
    least = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of most likely tokens that holds the probability `p`; never empties a row.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751). Of equally likely tokens those with smaller ids
    come first.
    """
    ordered, order = logits_BV.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of the tokens that come first
    dropped = torch.zeros_like(logits_BV, dtype=torch.bool).scatter_(-1, order, before >= p)
    return logits_BV.masked_fill(dropped, -math.inf)


def next_tokens(
    logits_BV: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    present_BV: Tensor | None = None,
) -> Tensor:
    """Choose one token per row -> int64 [B].

    In this order: repetition penalty (needs `present_BV`), temperature, top-k, top-p. Temperature 0 takes the
    largest logit, of equal ones the first, and draws no random number.
    """
    if repetition_penalty != 1.0:
        assert present_BV is not None
        logits_BV = penalise_repetition(logits_BV, present_BV, repetition_penalty)
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if top_k:
        logits_BV = keep_top_k(logits_BV, top_k)
    if top_p < 1.0:
        logits_BV = keep_top_p(logits_BV, top_p)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)
