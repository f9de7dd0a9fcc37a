"""Filling masked positions with a bidirectional rack: masked diffusion, run backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stackwise.config.errors import did_you_mean
from stackwise.inference.canvas import Canvas, Predictor
from stackwise.inference.errors import AskedError
from stackwise.inference.samplers import SAMPLERS
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import Denoiser
from stackwise.objectives.intervals import Intervals
from stackwise.objectives.schedules import NoiseSchedule

GRIDS = ("cosine", "linear")

OnStep = Callable[[Tensor], object]


@dataclass(frozen=True)
class Denoised:
    """Rows without a mask, and what it took.

    `ids` int64 [B, T]. `steps`: sampling steps in which something was filled. `forwards`: passes of the model.
    `block_length` null: all positions were open at once.
    """

    ids: Tensor
    sampler: str
    steps: int
    block_length: int | None
    seed: int
    forwards: int

    def __str__(self) -> str:
        block = "the whole length" if self.block_length is None else f"{self.block_length}"
        steps = f"{self.steps} step" + ("" if self.steps == 1 else "s")
        passes = f"{self.forwards} forward pass" + ("" if self.forwards == 1 else "es")
        return f"sampler {self.sampler}, {steps}, block {block}, seed {self.seed}, {passes}"


def denoise(
    predictor: Predictor,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 0,
    sampler: str = "confidence",
    steps: int = 64,
    grid: str = "cosine",
    block_length: int | None = None,
    threshold: float = 0.9,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Denoised:
    """Fill every mask token of `input_ids` [B, T], after `max_new_tokens` further ones were put behind each row.

    All other tokens stay as they are. `attention_mask` [B, T] is 0 at padding, which is left alone and on the left
    where new tokens are asked for; a padded row is filled as it would be by itself.

    `sampler`: ancestral, confidence, threshold, remask, unroll or stream (see `inference.samplers`). `steps` and
    `grid` (cosine or linear) say how many tokens ancestral, confidence and remask fill when, `threshold` how sure
    threshold must be. `block_length`: the gaps of a row are filled in blocks of so many, left to right, each block
    whole before the next begins, and the steps are shared among the blocks.

    Tokens are drawn in float64 by the Gumbel-max trick at `temperature`, 0 being the likeliest, from the `top_k` or
    the `top_p` most likely. Random numbers come from a generator of its own, seeded with `seed`. `on_step` gets a
    copy of the rows after every step.

    Raises: ValueError for an option out of range or that the sampler cannot do, for padding that holds new tokens off.
    """
    problems = _problems(
        max_new_tokens, sampler, steps, grid, block_length, threshold, temperature, top_k, top_p
    )
    if problems:
        raise AskedError("; ".join(problems))
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        raise ValueError(
            f"input_ids must be [rows, tokens] with at least one row, got {list(input_ids.shape)}"
        )
    input_ids = input_ids.long()
    mask = _checked_mask(input_ids, attention_mask, max_new_tokens)
    if max_new_tokens:
        rows = input_ids.shape[0]
        new = input_ids.new_full((rows, max_new_tokens), predictor.mask_id)
        input_ids = torch.cat((input_ids, new), dim=1)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(rows, max_new_tokens)), dim=1)
    before = predictor.forwards
    run, reads = SAMPLERS[sampler]
    with torch.no_grad():
        canvas = Canvas(
            predictor,
            input_ids,
            mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_step=on_step,
        )
        blocks = _blocks(canvas.gaps, block_length)
        given = {"steps": math.ceil(steps / max(1, len(blocks))), "grid": grid, "threshold": threshold}
        for open_BT in blocks:
            run(canvas, open_BT, **{name: given[name] for name in reads})
    assert not bool(canvas.masked(canvas.gaps).any()), f"the sampler {sampler} has left mask tokens"
    assert bool(((canvas.ids == input_ids) | canvas.gaps).all()), (
        f"the sampler {sampler} has changed the prompt"
    )
    return Denoised(canvas.ids, sampler, canvas.steps, block_length, seed, predictor.forwards - before)


def denoise_rack(
    rack: Rack,
    input_ids: Tensor,
    *,
    mask_id: int,
    intervals: Intervals | None = None,
    path: str = "rack",
    shifted: bool = False,
    banned: Collection[int] = (),
    schedule: NoiseSchedule | None = None,
    **options: Any,
) -> Denoised:
    """`denoise` with a rack: the mask tokens `mask_id` of `input_ids` [B, T] are filled.

    How the rack predicts: `intervals` and `path` for stacks that own intervals of noise, `shifted` for one that looks
    at the token before, `schedule` for one that is told the time; `banned` ids are never drawn. See
    `objectives.denoiser.Denoiser`; `denoiser_of` reads all this from a configuration. The rack runs in eval mode,
    without gradients, and is left as it was.

    Raises: ValueError for a causal rack, IndexError for a `mask_id` outside the vocabulary; what `denoise` raises.
    """
    needs_both_directions(rack)
    rack._check_ids(input_ids)
    if not 0 <= mask_id < rack.spec.vocab_size:
        raise IndexError(f"mask_id {mask_id} is outside the vocabulary of {rack.spec.vocab_size}")
    denoiser = Denoiser(
        rack,
        mask_id,
        intervals=intervals,
        path=path,
        shifted=shifted,
        banned=tuple(banned),
        schedule=schedule,
    )
    with eval_mode(rack):
        return denoise(denoiser, input_ids.to(rack.device), **options)


def needs_both_directions(rack: Rack) -> None:
    """ValueError naming the other call when the rack is causal."""
    if rack.is_causal:
        raise ValueError(
            "denoise needs a rack that attends in both directions, and this one is causal; a causal rack is sampled "
            "with generate, and model.attention_preset=bert_style builds a bidirectional one"
        )


def _blocks(gaps_BT: Tensor, length: int | None) -> list[Tensor]:
    """The gaps of each row in blocks of `length`, counted from the left: bool [B, T] each."""
    if not bool(gaps_BT.any()):
        return []
    if length is None:
        return [gaps_BT]
    number = (gaps_BT.long().cumsum(1) - 1).div(length, rounding_mode="floor")
    return [gaps_BT & (number == i) for i in range(int(number.max()) + 1)]


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)}, as input_ids is, got {list(attention_mask.shape)}"
        )
    mask = attention_mask.to(input_ids.device).bool()
    if max_new_tokens and not bool(mask[:, -1:].all()):
        raise ValueError("attention_mask ends in padding, where new tokens begin; pad prompts on the left")
    return mask


def _problems(
    max_new_tokens: int,
    sampler: str,
    steps: int,
    grid: str,
    block_length: int | None,
    threshold: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> list[str]:
    found = []
    if max_new_tokens < 0:
        found.append(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    for name, value, known in (("sampler", sampler, tuple(SAMPLERS)), ("grid", grid, GRIDS)):
        if value not in known:
            hint = did_you_mean(value, known)
            found.append(
                f"{name} must be one of {', '.join(known)}, got {value!r}" + (f"; {hint}" if hint else "")
            )
    if steps < 1:
        found.append(f"steps must be at least 1, got {steps}")
    if block_length is not None and block_length < 1:
        found.append(f"block_length must be at least 1, or null for the whole length, got {block_length}")
    if block_length is not None and sampler in ("unroll", "stream"):
        found.append(
            f"block_length cannot be set for {sampler}, which passes the stacks once over the whole length"
        )
    if not 0.0 <= threshold <= 1.0:
        found.append(f"threshold must be from 0 to 1, got {threshold}")
    if not 0.0 <= temperature < math.inf:
        found.append(f"temperature must be 0 (likeliest) or more, got {temperature}")
    if top_k < 0:
        found.append(f"top_k must be 0 (off) or more, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        found.append(f"top_p must be above 0 and at most 1 (off), got {top_p}")
    return found
