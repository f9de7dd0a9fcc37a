"""Text in, text out: prompts, streaming of whole characters, stop strings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stackwise.inference.generate import generate
from stackwise.inference.settings import GenerationSettings
from stackwise.model.rack import Rack

REPLACEMENT = "\ufffd"


class Codec(Protocol):
    """What is needed of a tokenizer; those of `stackwise.data` are made to fit."""

    vocab_size: int
    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def start_ids(self) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Completion:
    """A continuation: its text without the prompt, its token ids, and why it ended.

    reason: "stop" (a stop string, which is not part of `text`), "eos" (the end-of-text token), "length"
    (`max_new_tokens`). `seconds` is wall-clock time, reading the prompt included.
    """

    text: str
    tokens: list[int]
    reason: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of wall-clock time."""
        return len(self.tokens) / self.seconds if self.seconds > 0 else 0.0


class CharacterStream:
    """Token ids in, whole characters out.

    A character whose bytes come with several tokens is given out with the last of them. Joined, the pieces are
    `decode` of all ids.
    """

    WINDOW, CONTEXT = 32, 8

    def __init__(self, tokenizer: Codec) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters of the text of `_ids` that are out

    def push(self, token: int) -> str:
        """The characters that are complete with this token; may be none."""
        self._ids.append(token)
        whole = self._whole()
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._ids) > self.WINDOW:
            # decode only what is recent; some tokenizers look at the tokens before to place spaces
            self._ids = self._ids[-self.CONTEXT :]
            self._given = len(self._whole())
        return piece

    def _whole(self) -> str:
        text = self._tokenizer.decode(self._ids)
        # only the last character can be the beginning of one that is not complete yet
        return text[:-1] if text.endswith(REPLACEMENT) else text

    def flush(self) -> str:
        """What is left at the end: a character that was never completed, as U+FFFD."""
        return self._tokenizer.decode(self._ids)[self._given :]


class StopStrings:
    """Passes text on until one of some strings appears, also when it comes in pieces.

    What may be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty, and would end every text at once")
        self._stops = list(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that appeared first."""

    def push(self, piece: str) -> str:
        """The text that is safe to show. After a stop string nothing is."""
        if self.found is not None:
            return ""
        self._held += piece
        places = [(self._held.find(stop), stop) for stop in self._stops]
        hits = [(place, -len(stop), stop) for place, stop in places if place >= 0]
        if hits:
            place, _, self.found = min(hits)
            shown, self._held = self._held[:place], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def complete(
    rack: Rack,
    tokenizer: Codec,
    prompt: str,
    settings: GenerationSettings | None = None,
    stream: Callable[[str], object] | None = None,
) -> Completion:
    """Continue a text. `stream` receives the continuation piece by piece, in whole characters, as it comes.

    The continuation ends at a stop string of `settings`, at the tokenizer's end-of-text token, or after
    `max_new_tokens`. It may grow beyond the model's `max_seq_len`: a full context goes on with its newer half. An
    empty prompt begins with the tokenizer's `start_ids`. A tokenizer with more ids than the model is a ValueError; text that the
    tokenizer cannot spell raises what the tokenizer raises.
    """
    settings = settings or GenerationSettings()
    if tokenizer.vocab_size > rack.spec.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model knows {rack.spec.vocab_size}: "
            "they do not belong together"
        )
    started = time.perf_counter()
    ids = tokenizer.encode(prompt) or tokenizer.start_ids()
    characters, stops = CharacterStream(tokenizer), StopStrings(settings.stop)
    tokens: list[int] = []
    pieces: list[str] = []
    reason = "length"

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if stream is not None:
                stream(piece)

    def on_token(ids_B: Tensor) -> bool:
        nonlocal reason
        token = int(ids_B[0])
        tokens.append(token)
        if token == tokenizer.eos_id:
            reason = "eos"
            return True
        show(stops.push(characters.push(token)))
        if stops.found is not None:
            reason = "stop"
        return stops.found is not None

    generate(
        rack,
        torch.tensor([ids], device=rack.device),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        slide=True,
        on_token=on_token,
    )
    show(stops.push(characters.flush()))
    if stops.found is not None:
        reason = "stop"
    show(stops.flush())
    return Completion("".join(pieces), tokens, reason, time.perf_counter() - started)
