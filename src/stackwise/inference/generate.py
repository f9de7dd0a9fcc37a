"""Continuing token ids with a causal rack."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from stackwise.inference.decoder import Decoder
from stackwise.inference.sampling import next_tokens
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack

OnToken = Callable[[Tensor], object]


def generate(
    rack: Rack,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    pad_id: int | None = None,
    seed: int = 0,
    slide: bool = False,
    on_token: OnToken | None = None,
) -> Tensor:
    """Continue prompts [B, T] -> int64 [B, T + n], prompts included, with 1 <= n <= `max_new_tokens`.

    Prompts of unequal length are padded on the left, with an attention_mask [B, T] that is 0 there; a row then reads
    as it would by itself. Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `repetition_penalty` 1 are off; the
    penalty counts the prompt's tokens. Random numbers come from a generator of its own, seeded with `seed`.

    A row ends with one of `stop_ids`; while other rows go on it is filled with `pad_id`, or null: with the stop id it
    ended with. The call ends when every row has, after `max_new_tokens`, or when `on_token`, which is given each new
    column [B], returns something true.

    Prompt and new tokens together may be `max_seq_len` long; more is a ValueError, unless `slide` is set: then a full
    context goes on with its newer half, read anew from position 0.

    Other ValueErrors: a rack that is not causal, an empty prompt, padding on the right, an option out of range.
    The rack runs in eval mode, without gradients, and is left as it was.
    """
    problems = _problems(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    if problems:
        raise ValueError("; ".join(problems))
    mask = _check_prompts(rack, input_ids, attention_mask)
    rows, n_prompt = input_ids.shape
    limit, total = rack.spec.max_seq_len, n_prompt + max_new_tokens
    if rack.spec.fits(total):
        limit = max(limit, total)
    if n_prompt + max_new_tokens > limit and not slide:
        raise ValueError(
            f"{n_prompt} prompt tokens and {max_new_tokens} new ones are {n_prompt + max_new_tokens}, more than "
            f"max_seq_len = {limit}; ask for at most {max(0, limit - n_prompt)} new tokens, shorten the prompt, or "
            "set slide=True to go on with the newer half of a full context"
        )
    device = rack.device
    out = torch.empty(rows, n_prompt + max_new_tokens, dtype=torch.int64, device=device)
    out[:, :n_prompt] = input_ids
    generator = torch.Generator(device).manual_seed(seed)
    stops, ended = frozenset(stop_ids), [False] * rows
    fill = torch.zeros(rows, dtype=torch.int64, device=device)
    filled = torch.zeros(rows, dtype=torch.bool, device=device)
    end = n_prompt
    with torch.no_grad(), eval_mode(rack):
        present = None
        if repetition_penalty != 1.0:
            present = torch.zeros(rows, rack.spec.vocab_size, dtype=torch.bool, device=device)
            seen = torch.ones_like(out[:, :n_prompt], dtype=torch.bool) if mask is None else mask
            row, column = seen.nonzero(as_tuple=True)
            present[row, out[row, column]] = True
        decoder = Decoder(rack, rows, min(limit, n_prompt + max_new_tokens))
        logits = decoder.read(*_window(out[:, :n_prompt], mask, limit))
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "the model's logits are not finite: its weights are damaged or diverged in training"
            )
        while True:
            ids = next_tokens(
                logits,
                generator,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                present_BV=present,
            )
            if stops:
                ids = torch.where(filled, fill, ids)
                for i, token in enumerate(ids.tolist()):
                    if token in stops and not ended[i]:
                        ended[i] = filled[i] = True
                        fill[i] = token if pad_id is None else pad_id
            out[:, end] = ids
            end += 1
            if (on_token is not None and on_token(ids)) or all(ended) or end == out.shape[1]:
                break
            if present is not None:
                present.scatter_(1, ids[:, None], True)
            if decoder.full:
                logits = decoder.read(*_window(out[:, :end], mask, max(1, limit // 2)))
            else:
                logits = decoder.step(ids)
    return out[:, :end]


def _window(ids_BT: Tensor, mask: Tensor | None, width: int) -> tuple[Tensor, Tensor | None]:
    """The last `width` tokens and their mask; `mask` covers the prompts only."""
    start = max(0, ids_BT.shape[1] - width)
    if mask is None or start >= mask.shape[1]:
        return ids_BT[:, start:], None
    new = mask.new_ones(ids_BT.shape[0], ids_BT.shape[1] - mask.shape[1])
    return ids_BT[:, start:], torch.cat((mask[:, start:], new), dim=1)


def _check_prompts(rack: Rack, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as bool on the rack's device, after all that may be wrong with prompts has raised."""
    if not rack.is_causal:
        raise ValueError(
            "generate needs a causal rack, and this one attends in both directions; a bidirectional rack is sampled "
            "with denoise, and model.attention_preset=gpt_style builds a causal one"
        )
    rack._check_ids(input_ids)
    if input_ids.shape[1] == 0 or input_ids.shape[0] == 0:
        raise ValueError(
            f"input_ids is {list(input_ids.shape)}; give at least one prompt of at least one token"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)}, as input_ids is, got {list(attention_mask.shape)}"
        )
    mask = attention_mask.to(rack.device).bool()
    if not bool(mask[:, -1].all()):
        raise ValueError("attention_mask ends in padding; pad prompts on the left")
    return mask


def _problems(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> list[str]:
    found = []
    if max_new_tokens < 1:
        found.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0.0 <= temperature < math.inf:
        found.append(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k < 0:
        found.append(f"top_k must be 0 (off) or more, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        found.append(f"top_p must be above 0 and at most 1 (off), got {top_p}")
    if not 0.0 < repetition_penalty < math.inf:
        found.append(f"repetition_penalty must be above 0 (1 is off), got {repetition_penalty}")
    return found
