"""Texts with gaps: written by people as [MASK], read by the model as mask tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stackwise.inference.canvas import Predictor
from stackwise.inference.denoise import Denoised, denoise
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

    Raises: ValueError for a gap of length 0; what the tokenizer raises for text that it cannot spell.
    """
    ids: list[int] = []
    end = 0
    for gap in GAP.finditer(text):
        length = 1 if gap[1] is None else int(gap[1])
        if length < 1:
            raise ValueError(f"the gap {gap[0]} is empty; give it a length of at least 1")
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
    what stands in a gap, is never cut. `on_step` gets the text so far before the first step and after each one.

    Raises: ValueError for a text that with its gaps is longer than `max_length` tokens; what `denoise` raises.
    """
    settings = settings or GenerationSettings()
    started = time.perf_counter()
    prompt = encode_gaps(tokenizer, text, predictor.mask_id)
    new = 0 if gaps_in(text) else settings.max_new_tokens
    lead = 0
    if predictor.shifted and (not prompt or prompt[0] == predictor.mask_id):
        start = tokenizer.start_ids()  # the first token of a row cannot be predicted
        prompt, lead = start + prompt, len(start)
    if len(prompt) + new > max_length:
        raise ValueError(
            f"{len(prompt)} tokens of text and {new} new ones are {len(prompt) + new}, more than max_seq_len = "
            f"{max_length}; ask for at most {max(0, max_length - len(prompt))} new tokens (--max-new-tokens), or "
            "shorten the text"
            if new
            else f"the text has {len(prompt)} tokens, more than max_seq_len = {max_length}; shorten it"
        )
    ids = prompt + [predictor.mask_id] * new
    given = [i != predictor.mask_id for i in ids]

    def show(rows_BT: Tensor) -> None:
        if on_step is not None:
            on_step(pieces_of(tokenizer, rows_BT[0, lead:].tolist(), given[lead:], predictor.mask_id))

    rows = torch.tensor([ids], dtype=torch.int64, device=device)
    show(rows)
    result = denoise(
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
        seed=settings.seed,
        on_step=show,
    )
    out: list[int] = result.ids[0].tolist()
    if new and tokenizer.eos_id in out[len(prompt) :]:
        out = out[: out.index(tokenizer.eos_id, len(prompt))]
    pieces = pieces_of(tokenizer, out[lead:], given[lead : len(out)], predictor.mask_id)
    if new and pieces and pieces[-1].kind == "filled":
        pieces[-1] = _stopped(pieces[-1], settings.stop)
    return Infilled("".join(p.text for p in pieces), pieces, result, time.perf_counter() - started)


def _stopped(piece: Piece, stops: list[str]) -> Piece:
    ends = [piece.text.index(stop) for stop in stops if stop in piece.text]
    return Piece(piece.kind, piece.text[: min(ends)], piece.tokens) if ends else piece
