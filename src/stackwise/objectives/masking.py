"""Which positions are corrupted, what is written there, and at which time: pure functions of counter-based numbers.

Shape letters: B batch, T positions. All masks are bool, True = corrupted.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from stackwise.config.errors import did_you_mean
from stackwise.objectives.bits import GOLDEN, centred, keys, signed

TIME_KINDS = ("stratified", "antithetic", "uniform")
_LAST = (1 << 63) - 1


def eligible_positions(
    input_ids: Tensor, attention_mask: Tensor | None, special_ids: Collection[int] | Tensor
) -> Tensor:
    """bool [B, T]: the positions that may be corrupted, neither special nor padding.

    `attention_mask` [B, T] is false or 0 at padding, null without any; `special_ids` are token ids.
    """
    special = torch.as_tensor(
        special_ids if isinstance(special_ids, Tensor) else list(special_ids),
        dtype=torch.long,
        device=input_ids.device,
    )
    ordinary = ~torch.isin(input_ids.long(), special)
    return ordinary if attention_mask is None else ordinary & attention_mask.bool()


def choose(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """bool [B, T]: in each row the `counts` [B] eligible positions of the lowest scores [B, T], all if there are fewer.

    Exact, and nested: with the same scores, the choice of a count lies inside that of a larger count.
    """
    order = scores.masked_fill(~eligible, _LAST).argsort(dim=1, stable=True)
    wanted = torch.minimum(counts.long(), eligible.sum(1))[:, None]
    first = torch.arange(scores.shape[1], device=scores.device)[None] < wanted
    return torch.zeros_like(eligible).scatter(1, order, first) & eligible


def below(uniforms: Tensor, eligible: Tensor, rates: Tensor) -> Tensor:
    """bool [B, T]: each eligible position with probability rates [B], by uniforms [B, T] in [0, 1). Nested in the rate."""
    return (uniforms < rates.to(uniforms)[:, None]) & eligible


def ordinary_tokens(vocab_size: int, special_ids: Collection[int]) -> Tensor:
    """int64 [n]: the ids below `vocab_size` that are not special. Raises: ValueError when none is left."""
    ids = torch.tensor([i for i in range(vocab_size) if i not in set(special_ids)], dtype=torch.long)
    if not len(ids):
        raise ValueError(
            f"all {vocab_size} ids of the vocabulary are special, so no random token can be drawn"
        )
    return ids


def random_tokens(uniforms: Tensor, tokens: Tensor) -> Tensor:
    """Of `tokens` [n], one for each of uniforms [B, T] in [0, 1)."""
    return tokens[(uniforms * len(tokens)).long()]


def bert(
    input_ids: Tensor,
    masks: Tensor,
    mask_id: int,
    random_ids: Tensor,
    uniforms: Tensor,
    probs: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> Tensor:
    """Corrupted ids [B, T] (Devlin et al. 2018): at `masks`, MASK, a random token or the token itself.

    `probs` are the chances of the three, decided by uniforms [B, T] in [0, 1); random_ids [B, T] are the tokens that
    stand in. Elsewhere the ids stay.
    """
    to_mask, to_random, _ = probs
    masked = masks & (uniforms < to_mask)
    replaced = masks & ~masked & (uniforms < to_mask + to_random)
    return torch.where(replaced, random_ids, input_ids.long()).masked_fill(masked, mask_id)


def times(seed: int, sample_ids: Tensor, draws: Tensor, places: Tensor, kind: str) -> Tensor:
    """A time for each sample, float64 [B] in (0, 1], uniform over many samples. All arguments are integer [B].

    - stratified: frac(u0 + place · (√5 - 1)/2) with u0 from (seed, draw): any run of consecutive places is nearly
      even, however it is cut into batches. Computed modulo 2^64, so a large place loses nothing.
    - antithetic: u at an even place, 1 - u at the next, u from (seed, draw, pair).
    - uniform: from (seed, sample id, draw).

    Raises: ValueError for another kind.
    """
    if kind == "stratified":
        return centred(keys(seed, "time", draws) + places.long() * signed(GOLDEN))
    if kind == "antithetic":
        places = places.long()
        u = centred(keys(seed, "time pairs", draws, places >> 1))
        return torch.where(places % 2 == 0, u, 1 - u)
    if kind == "uniform":
        return centred(keys(seed, "time", sample_ids, draws))
    hint = did_you_mean(kind, TIME_KINDS)
    raise ValueError(
        f"unknown kind of times {kind!r}; allowed: {', '.join(TIME_KINDS)}" + (f"; {hint}" if hint else "")
    )
