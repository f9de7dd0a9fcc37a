"""The text samples that a run writes while it trains."""

from __future__ import annotations

import torch

from stackwise.config.root import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import denoiser_of


def sample_text(rack: Rack, tokenizer: Tokenizer, config: StackWiseConfig) -> tuple[str, str]:
    """A sample by the settings of `generation`, from `tracking.sample_prompt`; (prompt, continuation).

    It ends at an end-of-text token and before a text of `generation.stop`.
    """
    prompt = config.tracking.sample_prompt
    continuation = _continued if rack.is_causal else _filled
    ids = continuation(rack, tokenizer, config, tokenizer.encode(prompt))
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    text = tokenizer.decode(ids)
    ends = [text.index(stop) for stop in config.generation.stop if stop in text]
    return prompt, text[: min(ends, default=len(text))]


def _continued(rack: Rack, tokenizer: Tokenizer, config: StackWiseConfig, start: list[int]) -> list[int]:
    """New tokens, one by one."""
    generation, start = config.generation, start or tokenizer.start_ids()
    ids = rack.generate(
        torch.tensor([start], device=rack.device),
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        repetition_penalty=generation.repetition_penalty,
        stop_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        seed=generation.seed,
        slide=True,
    )
    new: list[int] = ids[0, len(start) :].tolist()
    return new


def _filled(rack: Rack, tokenizer: Tokenizer, config: StackWiseConfig, start: list[int]) -> list[int]:
    """New tokens in place of mask tokens. Beyond the context they are written behind its newer half, again and again."""
    generation, limit = config.generation, rack.spec.max_seq_len
    denoiser = denoiser_of(rack, config, tokenizer.special_ids)
    if denoiser.shifted and not start:
        start = tokenizer.start_ids()  # the first token of a row cannot be predicted
    ids = start + [denoiser.mask_id] * generation.max_new_tokens
    known, first, seed = len(start), 0, generation.seed
    while known < len(ids):
        if known - first >= limit:
            first = known - limit // 2
        end = min(len(ids), first + limit)
        done = rack.denoise(
            torch.tensor([ids[first:end]], device=rack.device),
            mask_id=denoiser.mask_id,
            intervals=denoiser.intervals,
            path=denoiser.path,
            shifted=denoiser.shifted,
            banned=denoiser.banned,
            schedule=denoiser.schedule,
            sampler=generation.sampler,
            steps=generation.steps,
            grid=generation.grid,
            block_length=generation.block_length,
            threshold=generation.threshold,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            seed=seed,
        )
        ids[first:end] = done.ids[0].tolist()
        known, seed = end, seed + 1
    return ids[len(start) :]
