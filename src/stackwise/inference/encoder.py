"""What an encoder tells about a text: likely tokens for its gaps, and vectors of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stackwise.inference.canvas import Predictor, finite
from stackwise.inference.errors import AskedError
from stackwise.inference.masked_text import check_length, encode_gaps, gaps_in
from stackwise.inference.text import Codec


@dataclass(frozen=True)
class Candidate:
    """A token for a gap, and its probability beside all other tokens."""

    token: str
    id: int
    probability: float


WHOLE = 1e-6
"""Share of masked tokens that a whole text is taken for: it goes to the stacks of the lightest noise."""


class Encoder(Protocol):
    """Final hidden states, such as those of `objectives.denoiser.Denoiser`; `shares` [B] as there."""

    def hidden(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, shares: Tensor | None = None
    ) -> Tensor: ...


def fill(
    predictor: Predictor,
    tokenizer: Codec,
    text: str,
    *,
    top: int = 5,
    max_length: int,
    device: torch.device | None = None,
) -> list[list[Candidate]]:
    """The `top` likeliest tokens for every masked position of a text, the likeliest first.

    Each position is judged by itself, in one pass of the model that sees all gaps as gaps. Probabilities are computed
    in float64. Raises: AskedError for a text without a gap or longer than `max_length` tokens, and for `top` below 1.
    """
    if top < 1:
        raise AskedError(f"top must be at least 1, got {top}")
    if not gaps_in(text):
        raise AskedError("the text has no gap; write [MASK] where a token is missing")
    ids = encode_gaps(tokenizer, text, predictor.mask_id)
    check_length(len(ids), max_length, "the text")
    rows = torch.tensor([ids], dtype=torch.int64, device=device)
    places = (rows[0] == predictor.mask_id).nonzero().squeeze(1)
    with torch.no_grad():
        chances = finite(predictor.logits(rows, places)).double().softmax(-1)
    # what is banned has no probability and is no candidate
    most = min(top, int((chances > 0).sum(-1).min()))
    best = chances.topk(most, dim=-1)
    return [
        [
            Candidate(tokenizer.decode([token]), token, chance)
            for token, chance in zip(tokens, values, strict=True)
        ]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def embed(
    encoder: Encoder,
    tokenizer: Codec,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 16,
    device: torch.device | None = None,
) -> Tensor:
    """One vector per text, float32 [n, D]: the mean of the final hidden states of its tokens.

    Texts are run in batches, padded on the right; padding has no part in the mean. Raises: AskedError for no text, a
    text without tokens or with more than `max_length`; what the tokenizer raises for text that it cannot spell.
    """
    rows = [tokenizer.encode(text) for text in texts]
    if not rows:
        raise AskedError("there is no text to embed")
    for text, tokens in zip(texts, rows, strict=True):
        if not tokens:
            raise AskedError(f"the text {text!r} has no tokens, and no mean")
        check_length(len(tokens), max_length, f"the text {text[:40]!r}")
    vectors = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.zeros(len(batch), width, dtype=torch.int64, device=device)
            real = torch.zeros_like(ids, dtype=torch.bool)
            for row, tokens in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                real[row, : len(tokens)] = True
            hidden = encoder.hidden(ids, attention_mask=real, shares=torch.full((len(batch),), WHOLE)).float()
            vectors.append((hidden * real[:, :, None]).sum(1) / real.sum(1, keepdim=True))
    return torch.cat(vectors)


def cosines(vectors: Tensor) -> Tensor:
    """Cosine similarity of every two rows, [n, D] -> float64 [n, n]."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return unit @ unit.T
