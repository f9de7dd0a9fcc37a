"""Texts with gaps: written by people as [MASK], read by the model as mask tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stackwise.inference.canvas import Predictor
from stackwise.inference.denoise import Denoised, denoise
from stackwise.inference.errors import AskedError
from stackwise.inference.settings import GenerationSettings
from stackwise.inference.text import Codec

GAP = re.compile(r"\[MASK(?::(\d+))?\]")
"""`[MASK]` is a gap of one token, `[MASK:12]` one of twelve."""


@dataclass(frozen=True)
class Piece:
    """A run of a text: given, filled by the model, or still masked (`text` is then empty)."""

    kind: str
    """given, filled or masked"""
    text: str
    tokens: int


@dataclass(frozen=True)
class Infilled:
    """A text without gaps. `pieces` in order; `text` is what they say; `seconds` is wall-clock time."""

    text: str
    pieces: list[Piece]
    result: Denoised
    seconds: float


def gaps_in(text: str) -> int:
    """Number of gaps, whatever their length."""
    return sum(1 for _ in GAP.finditer(text))


def encode_gaps(tokenizer: Codec, text: str, mask_id: int) -> list[int]:
    """Token ids of a text with gaps. The parts between gaps are encoded each by itself.

    Raises: AskedError for a gap of length 0; what the tokenizer raises for text that it cannot spell.
    """
    ids: list[int] = []
    end = 0
    for gap in GAP.finditer(text):
        length = 1 if gap[1] is None else int(gap[1])
        if length < 1:
            raise AskedError(f"the gap {gap[0]} is empty; give it a length of at least 1")
        ids += tokenizer.encode(text[end : gap.start()]) + [mask_id] * length
        end = gap.end()
    return ids + tokenizer.encode(text[end:])


def pieces_of(tokenizer: Codec, ids: list[int], given: list[bool], mask_id: int) -> list[Piece]:
    """The text of token ids as runs of given, filled and masked tokens."""
    kinds = [
        "given" if g else "masked" if i == mask_id else "filled" for i, g in zip(ids, given, strict=True)
    ]
    pieces: list[Piece] = []
    start = known = 0  # `known`: where the last run without a mask begins
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start]:
            continue
        if kinds[start] == "masked":
            pieces.append(Piece("masked", "", end - start))
            known = end
        else:
            context = ids[max(known, start - CONTEXT) : start]
            pieces.append(Piece(kinds[start], _text_after(tokenizer, context, ids[start:end]), end - start))
        start = end
    return pieces


CONTEXT = 8
"""Tokens before a run that are decoded with it."""


def _text_after(tokenizer: Codec, context: list[int], ids: list[int]) -> str:
    """Text of `ids` after other tokens: some tokenizers look at the tokens before to place spaces."""
    before, whole = tokenizer.decode(context), tokenizer.decode(context + ids)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


OnPieces = Callable[[list[Piece]], object]


def infill(
    predictor: Predictor,
    tokenizer: Codec,
    text: str,
    settings: GenerationSettings | None = None,
    *,
    max_length: int,
    device: torch.device | None = None,
    on_step: OnPieces | None = None,
) -> Infilled:
    """Fill the gaps of a text, or where it has none continue it by `settings.max_new_tokens` tokens.

    A continuation ends before a stop string of `settings` and at the tokenizer's end-of-text token; what is given, and
    what stands in a gap, is never cut. One that grows beyond `max_length` tokens goes on, each time the model's context
    is full, behind the newer half of it. `on_step` gets the text so far before the first step and after each one.

    Raises: AskedError for a text that with its gaps is longer than `max_length` tokens; what `denoise` raises.
    """
    settings = settings or GenerationSettings()
    started = time.perf_counter()
    ids = encode_gaps(tokenizer, text, predictor.mask_id)
    continues = not gaps_in(text)
    if not continues:
        check_length(len(ids), max_length, "the text")
    lead: list[int] = []
    if predictor.shifted and (not ids or ids[0] == predictor.mask_id):
        lead = tokenizer.start_ids()  # the first token of a row cannot be predicted
    n_prompt = len(lead) + len(ids)
    ids = lead + ids + [predictor.mask_id] * (settings.max_new_tokens if continues else 0)
    given = [i != predictor.mask_id for i in ids]
    start = end = 0  # the window that is being filled

    def pieces(stop: int) -> list[Piece]:
        return pieces_of(tokenizer, ids[len(lead) : stop], given[len(lead) : stop], predictor.mask_id)

    def show(rows_BT: Tensor) -> None:
        ids[start:end] = rows_BT[0].tolist()
        if on_step is not None:
            on_step(pieces(len(ids)))

    results: list[Denoised] = []
    known, ended = n_prompt if continues else 0, False
    while known < len(ids) and not ended:
        if known - start >= max_length:
            start = known - max_length // 2
        end = min(len(ids), start + max_length)
        rows = torch.tensor([ids[start:end]], dtype=torch.int64, device=device)
        if not results:
            show(rows)
        results.append(_denoise(predictor, rows, settings, settings.seed + len(results), show))
        known = end
        ended = continues and _ends(tokenizer, ids[n_prompt:known], pieces(known)[-1].text, settings.stop)
    if continues and tokenizer.eos_id in ids[n_prompt:known]:
        known = ids.index(tokenizer.eos_id, n_prompt)
    done = pieces(known)
    if continues and known > n_prompt:
        done[-1] = _stopped(done[-1], settings.stop)
    result = replace(
        results[0],
        ids=torch.tensor([ids[len(lead) : known]], dtype=torch.int64, device=device),
        steps=sum(part.steps for part in results),
        forwards=sum(part.forwards for part in results),
    )
    return Infilled("".join(p.text for p in done), done, result, time.perf_counter() - started)


def _denoise(
    predictor: Predictor,
    rows: Tensor,
    settings: GenerationSettings,
    seed: int,
    on_step: Callable[[Tensor], object],
) -> Denoised:
    return denoise(
        predictor,
        rows,
        sampler=settings.sampler,
        steps=settings.steps,
        grid=settings.grid,
        block_length=settings.block_length,
        threshold=settings.threshold,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=seed,
        on_step=on_step,
    )


def _ends(tokenizer: Codec, ids: list[int], text: str, stops: list[str]) -> bool:
    return tokenizer.eos_id in ids or any(stop in text for stop in stops)


def _stopped(piece: Piece, stops: list[str]) -> Piece:
    ends = [piece.text.index(stop) for stop in stops if stop in piece.text]
    return Piece(piece.kind, piece.text[: min(ends)], piece.tokens) if ends else piece


def check_length(length: int, limit: int, what: str) -> None:
    """AskedError for a text of more than `limit` tokens."""
    if length > limit:
        raise AskedError(f"{what} has {length} tokens, more than max_seq_len = {limit}; shorten it")
