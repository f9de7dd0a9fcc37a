"""Text under way: some positions known, some still masked, and how the masked ones get their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from stackwise.inference.sampling import keep_top_k, keep_top_p
from stackwise.objectives.intervals import Intervals

ROWS = 256
"""Positions whose logits are held in float64 at a time."""


class Predictor(Protocol):
    """What samplers need: the model's prediction at masked positions, such as `objectives.denoiser.Denoiser`."""

    mask_id: int
    intervals: Intervals | None
    shifted: bool
    """Whether a token is predicted at the position before it, so that the first of a row cannot be."""
    forwards: int

    def logits(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor: ...


class Canvas:
    """Rows [B, T] whose masked positions are filled step by step; all others never change.

    `attention_mask` bool [B, T], False = padding, which may hold anything. Padding takes no position, so a padded row
    reads as the bare one. `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 are off. They shape what
    is drawn; how sure the model is of a position is always told by its own probabilities.
    """

    def __init__(
        self,
        predictor: Predictor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        on_step: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.predictor, self.ids = predictor, input_ids.clone()
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator(input_ids.device).manual_seed(seed)
        self.steps = 0
        self._on_step = on_step
        self.attention_mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        real = torch.ones_like(self.ids, dtype=torch.bool) if attention_mask is None else attention_mask
        self.gaps = (self.ids == predictor.mask_id) & real
        """bool [B, T]: the positions to fill, as they were given."""
        self.n_real = real.sum(1)
        """int64 [B]: tokens of each row that are no padding."""
        self.position_ids = None if self.attention_mask is None else (real.long().cumsum(1) - 1).clamp_min(0)

    def masked(self, among_BT: Tensor) -> Tensor:
        """bool [B, T]: the positions of `among_BT` that are not filled."""
        return among_BT & (self.ids == self.predictor.mask_id)

    def logits(self, at_BT: Tensor, shares_B: Tensor | None = None) -> Tensor:
        """The model's logits [n, V] at the positions `at_BT`, row by row; other rows do not run.

        `shares_B`: the share of masked tokens that each row is to be taken for; null: what it is.
        """
        rows = at_BT.any(1).nonzero().squeeze(1)

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        logits = self.predictor.logits(
            self.ids[rows],
            at_BT[rows].flatten().nonzero().squeeze(1),
            attention_mask=of(self.attention_mask),
            position_ids=of(self.position_ids),
            shares=of(shares_B),
        )
        return finite(logits)

    def fill(self, at_BT: Tensor, logits: Tensor) -> Tensor:
        """Draw a token for every position of `at_BT` from its row of `logits` [n, V] -> float64 [n].

        The result is the probability that the model gives to each drawn token.
        """
        tokens, probabilities = self._draw(logits)
        self.ids[at_BT] = tokens
        return probabilities

    def mask(self, at_BT: Tensor) -> None:
        """Take back the tokens of some gaps."""
        self.ids[at_BT & self.gaps] = self.predictor.mask_id

    def end_step(self) -> None:
        """Count a step and show its result."""
        self.steps += 1
        if self._on_step is not None:
            self._on_step(self.ids.clone())

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens, chances = [], []
        for part in logits.split(ROWS):
            own = part.double()
            drawn = gumbel_max(
                own, self.generator, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
            )
            tokens.append(drawn)
            chances.append(own.softmax(-1).gather(1, drawn[:, None]).squeeze(1))
        return torch.cat(tokens), torch.cat(chances)


def gumbel_max(
    logits: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Draw one token per row of float64 logits [n, V] -> int64 [n].

    argmax(logits / temperature + g) with g = -log(-log(u)): a draw from the softmax. In float32 the largest g would be
    cut off, which makes unlikely tokens rarer than they should be (Zheng et al. 2024, arXiv 2409.02908). Temperature 0
    takes the largest logit, of equal ones the first, and draws nothing.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1.0:
        logits = keep_top_p(logits, top_p)
    uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    # 0 can be drawn and would make a token impossible
    noise = -(-uniform.clamp_min_(1e-300).log_()).log_()
    return (logits + noise).argmax(-1)


def certainty(logits: Tensor) -> Tensor:
    """Probability of the likeliest token at each position: [n, V] -> float64 [n].

    It depends on the model alone, not on what is drawn. Choosing positions by the probability of a drawn token would
    keep likely draws and throw away others, and no longer sample what the model says.
    """
    parts = [part.double() for part in logits.split(ROWS)]
    return torch.cat([(part.amax(-1) - part.logsumexp(-1)).exp() for part in parts])


def highest(values: Tensor, at_BT: Tensor, counts_B: Tensor) -> Tensor:
    """The `counts_B` positions of each row with the highest values, bool [B, T].

    `values` float64 [n] belong to the positions `at_BT`, row by row. Of equal ones those further left come first; a
    row with fewer positions than its count gives them all.
    """
    spread = torch.full(at_BT.shape, -math.inf, dtype=torch.float64, device=at_BT.device)
    spread[at_BT] = values
    order = spread.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return at_BT & (rank < counts_B[:, None])


def finite(logits: Tensor) -> Tensor:
    """The logits; where a position has no finite largest one, a ValueError."""
    if logits.numel() and not bool(logits.amax(-1).isfinite().all()):
        raise ValueError("the model's logits are not finite: its weights are damaged or diverged in training")
    return logits
