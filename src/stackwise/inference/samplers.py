"""Samplers of masked diffusion: in which order the masked positions of a canvas are filled.

A sampler fills the positions `open_BT` of a canvas, bool [B, T], all of them masked. Every step is one pass of the
model, over the rows that still have something to fill; a step that would fill nothing is not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stackwise.inference.canvas import Canvas, certainty, finite, highest
from stackwise.inference.errors import AskedError
from stackwise.objectives.denoiser import Denoiser

SLACK = 1e-9
"""Products of shares and counts that are whole numbers but for rounding count as whole."""


def share_left(grid: str, done: float) -> float:
    """Share of the positions that is still masked after a part `done` of the steps, from 1 at 0 to 0 at 1.

    cosine: cos(pi/2 done), slow at first, while little is known (Chang et al. 2022, arXiv 2202.04200);
    linear: 1 - done.
    """
    if done >= 1.0:
        return 0.0
    return math.cos(0.5 * math.pi * done) if grid == "cosine" else 1.0 - done


def ancestral(canvas: Canvas, open_BT: Tensor, *, steps: int, grid: str) -> None:
    """Reverse the noise: each masked position is filled with probability (alpha_s - alpha_t) / (1 - alpha_t).

    1 - alpha_t is the share still masked before the step, 1 - alpha_s the one after it (Sahoo et al. 2024,
    arXiv 2406.07524, eq. 7). With more steps than tokens most steps fill one token or none.
    """
    for i in range(steps):
        before, after = share_left(grid, i / steps), share_left(grid, (i + 1) / steps)
        uniform = torch.rand(
            open_BT.shape, dtype=torch.float64, device=open_BT.device, generator=canvas.generator
        )
        at = canvas.masked(open_BT) & (uniform < (before - after) / before)
        if bool(at.any()):
            canvas.fill(at, canvas.logits(at))
            canvas.end_step()


def confidence(canvas: Canvas, open_BT: Tensor, *, steps: int, grid: str) -> None:
    """After step i of K, ceil(n share_left(i / K)) of n positions are masked; the surest ones are filled first."""
    total = open_BT.sum(1)
    for i in range(1, steps + 1):
        masked = canvas.masked(open_BT)
        reveal = masked.sum(1) - _kept(total, share_left(grid, i / steps))
        at = masked & (reveal > 0)[:, None]
        if bool(at.any()):
            _fill_surest(canvas, at, reveal, canvas.logits(at))


def threshold(canvas: Canvas, open_BT: Tensor, *, threshold: float) -> None:
    """Each step fills every position the model is surer of than `threshold`, and the surest one in any case.

    Wu et al. 2025, arXiv 2505.22618. At 1 the positions are filled one by one.
    """
    one = torch.ones_like(open_BT[:, 0], dtype=torch.int64)
    while bool((masked := canvas.masked(open_BT)).any()):
        logits = canvas.logits(masked)
        sure = certainty(logits)
        chosen = highest(sure, masked, one)
        chosen[masked] |= sure > threshold
        canvas.fill(chosen, logits[chosen[masked]])
        canvas.end_step()


def remask(canvas: Canvas, open_BT: Tensor, *, steps: int, grid: str) -> None:
    """Each step fills everything, then masks again the tokens that were least likely when they were drawn.

    As many stay filled as with `confidence`, but a token may be taken back later (Ghazvininejad et al. 2019,
    arXiv 1904.09324). This favours likely text over exact samples.
    """
    total = open_BT.sum(1)
    chance = torch.zeros(open_BT.shape, dtype=torch.float64, device=open_BT.device)
    for i in range(1, steps + 1):
        kept = _kept(total, share_left(grid, i / steps))
        at = canvas.masked(open_BT) & (kept < total)[:, None]  # a row that would be masked whole waits
        if not bool(at.any()):
            continue
        chance[at] = canvas.fill(at, canvas.logits(at))
        filled = open_BT & ~canvas.masked(open_BT)
        canvas.mask(highest(-chance[filled], filled, kept))
        canvas.end_step()


def unroll(canvas: Canvas, open_BT: Tensor) -> None:
    """Depth as time: one pass per interval of noise, from heavy to light, each along the path of its stack.

    After the pass for the interval (r_d, r_{d+1}] at most r_d of a row's T tokens are masked, the least sure ones. A
    row begins with the interval of its own share of masked tokens.
    """
    intervals = canvas.predictor.intervals
    if intervals is None:
        raise AskedError(NO_INTERVALS)
    for distance in reversed(range(intervals.count)):
        low, high = intervals.of(distance)
        masked, reveal = _above(canvas, open_BT, low)
        if bool(masked.any()):
            shares = torch.full_like(canvas.n_real, high, dtype=torch.float64)
            _fill_surest(canvas, masked, reveal, canvas.logits(masked, shares))


def stream(canvas: Canvas, open_BT: Tensor) -> None:
    """As `unroll`, in one pass through the stacks: each runs once, on what the one before it has left.

    After the stack of an interval the head reads the states, the surest positions are filled and embedded anew, and
    the states of all others are handed on. It costs as much as one pass of the whole rack and is the less exact form:
    `unroll` lets each pass begin at the embedding, as in training.
    """
    denoiser = canvas.predictor
    if not isinstance(denoiser, Denoiser) or denoiser.intervals is None:
        raise AskedError(NO_INTERVALS)
    rack, last = denoiser.rack, len(denoiser.rack.stacks) - 1
    if any(stack.io is not None for stack in rack.stacks):
        raise AskedError(OWN_EMBEDDINGS)
    context = rack.make_context(canvas.ids, canvas.attention_mask, canvas.position_ids)
    x_BTD = rack.embed(canvas.ids, context)
    begun_B = torch.zeros_like(open_BT[:, 0])
    denoiser.forwards += 1
    end = 0
    for position, stack in enumerate(rack.stacks):
        start, end = end, end + len(stack.blocks)
        masked, reveal = _above(canvas, open_BT, denoiser.intervals.of(last - position)[0])
        begun_B |= masked.any(1)
        if not bool(begun_B.any()):
            continue
        x_BTD = torch.where(begun_B[:, None, None], rack.run(x_BTD, context, start, end), x_BTD)
        if bool(masked.any()):
            hidden = x_BTD
            if denoiser.path != "alone":
                hidden = rack.run(hidden, context, len(rack.blocks()) - len(rack.tail))
            shares = torch.full_like(
                canvas.n_real, denoiser.intervals.of(last - position)[1], dtype=torch.float64
            )
            at = masked.flatten().nonzero().squeeze(1)
            logits = finite(denoiser.read(rack.norm(hidden), at, shares))
            chosen = _fill_surest(canvas, masked, reveal, logits)
            x_BTD = torch.where(chosen[:, :, None], rack.embed(canvas.ids, context), x_BTD)


OWN_EMBEDDINGS = (
    "stream hands states from stack to stack, and stacks of this rack have embeddings of their own; choose the sampler "
    "unroll, or train with training.progressive.independent_io=shared"
)
NO_INTERVALS = (
    "no stack of this rack owns an interval of noise, so there is nothing to unroll; choose the sampler confidence, "
    "or train with training.progressive.time_interpretation depth"
)

SAMPLERS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "ancestral": (ancestral, ("steps", "grid")),
    "confidence": (confidence, ("steps", "grid")),
    "threshold": (threshold, ("threshold",)),
    "remask": (remask, ("steps", "grid")),
    "unroll": (unroll, ()),
    "stream": (stream, ()),
}
"""Name -> the sampler, and the options it reads."""


def _kept(total_B: Tensor, share: float) -> Tensor:
    return (total_B.double() * share - SLACK).ceil().long().clamp_min(0)


def _above(canvas: Canvas, open_BT: Tensor, low: float) -> tuple[Tensor, Tensor]:
    """The masked positions of rows with more than a share `low` of masks, and how many are to be filled [B]."""
    masked = canvas.masked(open_BT)
    reveal = masked.sum(1) - (canvas.n_real.double() * low + SLACK).floor().long()
    return masked & (reveal > 0)[:, None], reveal


def _fill_surest(canvas: Canvas, at_BT: Tensor, counts_B: Tensor, logits: Tensor) -> Tensor:
    """Fill `counts_B` of the positions `at_BT`, whose logits [n, V] are given -> bool [B, T], those filled."""
    chosen = highest(certainty(logits), at_BT, counts_B)
    canvas.fill(chosen, logits[chosen[at_BT]])
    canvas.end_step()
    return chosen
