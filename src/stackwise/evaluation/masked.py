"""How well hidden tokens are guessed: masked loss and accuracy, and pseudo-perplexity.

Neither is a likelihood of the text, so both are labelled pseudo. Shape letters: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stackwise.data.corpus import TokenSplit
from stackwise.evaluation.windows import Progress, Windows, unseen
from stackwise.model.modes import eval_mode
from stackwise.objectives import masking
from stackwise.objectives.base import IGNORE, Example, Noise
from stackwise.objectives.denoiser import Denoiser
from stackwise.objectives.masked import Masked, precedes, scored_positions
from stackwise.training.device import computing_in

HIDDEN_TOKENS = 2048
"""How many tokens pseudo-perplexity hides, one by one, where its number of windows is not given."""


@dataclass(frozen=True)
class MaskedScores:
    """Guesses of corrupted tokens: mean loss in nats and share of likeliest tokens that are right, over `tokens`.

    `share` is the share of the ordinary tokens that was corrupted. `standard_error` is that of the loss, over passes;
    null with one pass.
    """

    nats_per_masked_token: float
    standard_error: float | None
    accuracy: float
    share: float
    tokens: int
    windows: int
    passes: int
    seq_len: int
    label: str = "pseudo"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def masked_scores(
    denoiser: Denoiser,
    objective: Masked,
    split: TokenSplit,
    *,
    seq_len: int,
    batch_size: int = 8,
    batches: int | None = None,
    passes: int = 4,
    noise: Noise | None = None,
    packing: bool = True,
    doc_mask: bool = True,
    pad_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = unseen,
) -> MaskedScores:
    """Corrupt the windows of a split as `objective` does, other tokens in each pass, and score the guesses.

    `noise`: range of the share of corrupted tokens, null: the objective's own. The corruption is one that training
    never meets. The mask token is never guessed. In float32 the figures do not depend on `batch_size` (up to 1e-6).
    ValueErrors: gaussian corruption, which hides no token; nothing to score; those of `Windows`.
    """
    if objective.corruption == "gaussian":
        raise ValueError(
            "gaussian corruption adds noise to embeddings and hides no token that could be guessed"
        )
    rack = denoiser.rack
    windows = Windows(
        rack,
        split,
        seq_len=seq_len,
        batch_size=batch_size,
        batches=batches,
        packing=packing,
        doc_mask=doc_mask,
        pad_id=pad_id,
        passes=passes,
        progress=progress,
    )
    objective = objective.for_evaluation()
    sums = torch.zeros(passes, 3, dtype=torch.float64)  # nats, right guesses, corrupted tokens
    ordinary = 0
    with torch.no_grad(), eval_mode(rack), computing_in(dtype, rack.device):
        for number in range(passes):
            for batch in windows.of_pass(number):
                example = objective.corrupt(batch, noise)
                mask = batch.get("attention_mask")
                eligible = objective.eligible(batch["input_ids"], mask, batch.get("document_ids"))
                masked, present = (example.labels != IGNORE).sum(1), eligible.sum(1)
                # The share that the row was given; corruption may leave some of its tokens as they are.
                shares = (masked.double() / present.clamp_min(1)).clamp_min(1e-9)
                nll, right = denoiser.judge(example.to(rack.device), shares)
                sums[number] += torch.stack((nll.double().sum(), right.sum(), masked.sum())).cpu()
                ordinary += int(present.sum())
    if not sums[:, 2].all():
        raise ValueError("there is nothing to evaluate: every token of the split is special or padding")
    losses = sums[:, 0] / sums[:, 2]
    tokens = float(sums[:, 2].sum())
    return MaskedScores(
        nats_per_masked_token=float(sums[:, 0].sum() / tokens),
        standard_error=float(losses.std() / math.sqrt(passes)) if passes > 1 else None,
        accuracy=float(sums[:, 1].sum() / tokens),
        share=tokens / ordinary,
        tokens=int(tokens),
        windows=windows.count,
        passes=passes,
        seq_len=windows.seq_len,
    )


@dataclass(frozen=True)
class PseudoPerplexity:
    """exp of the mean loss of `tokens` tokens, each hidden alone and guessed from all others of its window."""

    pseudo_perplexity: float
    nats_per_token: float
    accuracy: float
    tokens: int
    windows: int
    seq_len: int
    label: str = "pseudo"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def pseudo_perplexity(
    denoiser: Denoiser,
    split: TokenSplit,
    *,
    seq_len: int,
    batch_size: int = 8,
    windows: int | None = None,
    special_ids: Sequence[int] = (),
    packing: bool = True,
    doc_mask: bool = True,
    pad_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = unseen,
) -> PseudoPerplexity:
    """Pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659) over `windows` windows spread over the split.

    A window takes as many forward passes as it has tokens; null takes windows of about 2048 tokens in all. `special_ids`
    are never hidden, `progress` hears of every window. ValueErrors: nothing to score; those of `Windows`.
    """
    rack = denoiser.rack
    rows = Windows(
        rack,
        split,
        seq_len=seq_len,
        batch_size=1,
        batches=windows or max(1, HIDDEN_TOKENS // seq_len),
        packing=packing,
        doc_mask=doc_mask,
        pad_id=pad_id,
        progress=progress,
    )
    nats, right, tokens = 0.0, 0, 0
    with torch.no_grad(), eval_mode(rack), computing_in(dtype, rack.device):
        for row in rows.of_pass(0):
            places = eligible_of(denoiser, row, special_ids)[0].nonzero().squeeze(1)
            tokens += len(places)
            for hidden in places.split(batch_size) if len(places) else ():
                example = one_hidden(denoiser, row, hidden)
                shares = torch.full((len(hidden),), 1 / len(places), dtype=torch.float64)
                nll, hits = denoiser.judge(example.to(rack.device), shares)
                nats += float(nll.double().sum())
                right += int(hits.sum())
    if not tokens:
        raise ValueError("there is nothing to evaluate: every token of these windows is special or padding")
    mean = nats / tokens
    return PseudoPerplexity(
        pseudo_perplexity=math.exp(mean) if mean < 700 else math.inf,
        nats_per_token=mean,
        accuracy=right / tokens,
        tokens=tokens,
        windows=rows.count,
        seq_len=rows.seq_len,
    )


def eligible_of(denoiser: Denoiser, batch: dict[str, Tensor], special_ids: Sequence[int]) -> Tensor:
    """bool [B, T]: the tokens of a batch that may be hidden and can be guessed."""
    ids = batch["input_ids"]
    eligible = masking.eligible_positions(ids, batch.get("attention_mask"), (*special_ids, denoiser.mask_id))
    return eligible & precedes(ids, batch.get("document_ids")) if denoiser.shifted else eligible


def one_hidden(denoiser: Denoiser, row: dict[str, Tensor], places: Tensor) -> Example:
    """Copies of a row, each with the token at one of `places` [B] hidden."""
    rows = len(places)
    fields = {
        name: row[name].expand(rows, -1)
        for name in ("attention_mask", "position_ids", "document_ids")
        if name in row
    }
    ids = row["input_ids"].repeat(rows, 1)
    at = torch.arange(rows)
    labels = torch.full_like(ids, IGNORE)
    labels[at, places - int(denoiser.shifted)] = ids[at, places]
    ids[at, places] = denoiser.mask_id
    return Example(ids, labels, **fields, scored=scored_positions(labels))
