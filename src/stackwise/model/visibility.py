"""Who sees whom: causality, window, padding and documents, always combined.

Key j is visible to query i iff 0 <= i - j (causal), |i - j| < window or j is among the first `sinks` real tokens of its
document, j is real, and both belong to one document. A query row that sees no key must give 0. Masks are boolean,
True = visible, and are built once per forward pass and kind of attention; with ALiBi they become numbers to add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Kind = tuple[bool, int | None, int, tuple[float, ...]]


class Mask(NamedTuple):
    """What attention needs.

    `is_causal`: T = S and query t sees no key after t. `visible` [B or 1, 1, T, S]: all that may be seen, causality
    included; null when `is_causal` says all. `dead` [B, 1, T, 1]: queries that see nothing; null when there are none.
    `bias` [B or 1, N, T, S]: added to the scores, very low where nothing is to be seen; then `visible` is null.
    """

    is_causal: bool
    visible: Tensor | None
    dead: Tensor | None
    bias: Tensor | None = None


def held_tokens(n_tokens: int, window: int, sinks: int, device: torch.device | None = None) -> Tensor:
    """Which tokens a bounded cache holds after `n_tokens`, by slot (`cache.BlockCache`): int64 [at most sinks + window]."""
    slots = torch.arange(min(n_tokens, sinks + window), device=device)
    latest = slots + window * ((n_tokens - 1 - slots) // window)
    return torch.where(slots < sinks, slots, latest)


class Visibility:
    """Masks of one forward pass.

    attention_mask [B, S] (True or 1 = real token; S counts cached tokens too), document_ids [B, T]. `past` is the
    number of cached tokens before the T new ones, `capacity` the number that the cache was made for; documents and a
    cache are not combined.
    """

    def __init__(
        self,
        n_new: int,
        past: int = 0,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        device: torch.device | None = None,
        capacity: int | None = None,
    ) -> None:
        self.n_new, self.past, self.device, self.capacity = n_new, past, device, capacity
        self.padding = None if attention_mask is None else attention_mask.bool()
        self.documents = document_ids
        self._made: dict[tuple[Kind, torch.dtype], Mask] = {}
        self._same: list[Tensor] = []

    @property
    def present(self) -> Tensor | None:
        """bool [B, T]: which of the new tokens are real; null: all."""
        return None if self.padding is None else self.padding[:, self.past :]

    def mask(
        self,
        causal: bool,
        window: int | None = None,
        sinks: int = 0,
        slopes: tuple[float, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> Mask:
        """The mask of one kind of attention (`BlockSpec.sight` lists the first four). `slopes` of ALiBi, one per head;
        `dtype` is that of a bias."""
        kind = (causal, window, sinks, slopes)
        if (kind, dtype) not in self._made:
            self._made[kind, dtype] = self._make(kind, dtype)
        return self._made[kind, dtype]

    def same_document(self, width: int) -> list[Tensor] | None:
        """For lags 1 .. width-1, [B, T, 1]: whether token t - lag belongs to token t's document; null without documents."""
        if self.documents is None:
            return None
        for lag in range(len(self._same) + 1, width):
            same = torch.zeros_like(self.documents, dtype=torch.bool)
            same[:, lag:] = self.documents[:, lag:] == self.documents[:, :-lag]
            self._same.append(same.unsqueeze(-1))
        return self._same[: width - 1]

    def lengths(self, positions_BT: Tensor) -> Tensor:
        """Tokens in the sequence that each token belongs to, its document or the real part of its row: [B or 1, T or 1].

        A sequence is as long as the last of its positions says. With a cache that is the length it was made for, as no
        one knows the end of a text that is still written.
        """
        if self.capacity is not None:
            whole = torch.full((1, 1), self.capacity, device=positions_BT.device)
            return whole if self.padding is None else whole - (~self.padding).sum(1, keepdim=True)
        ends = positions_BT
        if self.padding is not None:
            ends = ends.masked_fill(~self.padding, 0)
        if self.documents is None:
            return ends.amax(dim=1, keepdim=True) + 1
        ends = ends.expand(self.documents.shape)
        same = self.documents[:, :, None] == self.documents[:, None, :]
        first = same.byte().argmax(dim=-1)  # where the token's document begins
        last = torch.zeros_like(ends).scatter_reduce(1, first, ends, "amax")
        return last.gather(1, first) + 1

    def _make(self, kind: Kind, dtype: torch.dtype) -> Mask:
        causal, window, sinks, slopes = kind
        total = self.past + self.n_new
        if window is not None and (total <= window or (self.n_new == 1 and self.past)):
            if self.past and total > window:
                return self._last_token(kind, dtype)
            window = None  # nothing is out of sight
        if self.padding is None and self.documents is None and window is None and not slopes:
            if not causal or self.n_new == 1:
                return Mask(False, None, None)  # a single new token sees all that came before
            if self.past == 0:
                return Mask(True, None, None)
        tokens = torch.arange(total, device=self.device)
        if kind[1] is not None and self.past:
            held = held_tokens(self.past, kind[1], sinks, self.device)
            tokens = torch.cat((held, tokens[self.past :]))
        apart = torch.arange(self.past, total, device=self.device)[:, None] - tokens
        visible = (apart >= 0 if causal else torch.ones_like(apart, dtype=torch.bool))[None, None]
        if window is not None:
            near = (apart.abs() < window)[None, None]
            visible = visible & (near | self._first(sinks)[..., tokens] if sinks else near)
        if self.documents is not None:
            visible = visible & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        dead = None
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, tokens]
            dead = ~visible.any(dim=-1, keepdim=True)
        is_causal = causal and self.past == 0
        if slopes:
            return Mask(False, None, dead, self._bias(visible, apart, slopes, dtype))
        return Mask(is_causal, visible, dead)

    def _last_token(self, kind: Kind, dtype: torch.dtype) -> Mask:
        """For one new token and a bounded cache, which by then holds what the token sees and nothing else."""
        _, window, sinks, slopes = kind
        assert window is not None
        self._check_sinks(sinks)
        if self.padding is None and not slopes:
            return Mask(False, None, None)
        tokens = held_tokens(self.past + 1, window, sinks, self.device)
        visible, dead = torch.ones(1, 1, 1, len(tokens), dtype=torch.bool, device=self.device), None
        if self.padding is not None:
            visible = self.padding[:, None, None, tokens]
            dead = ~visible.any(dim=-1, keepdim=True)
        if slopes:
            return Mask(False, None, dead, self._bias(visible, (self.past - tokens)[None], slopes, dtype))
        return Mask(False, visible, dead)

    def _first(self, sinks: int) -> Tensor:
        """Whether each token is among the first real ones of its document: [B or 1, 1, 1, S]."""
        self._check_sinks(sinks)
        if self.documents is not None:
            before = (self.documents[:, :, None] == self.documents[:, None, :]).tril(-1)
            if self.padding is not None:
                before = before & self.padding[:, None, :]
            return (before.sum(-1) < sinks)[:, None, None]
        if self.padding is not None:
            return (self.padding.cumsum(1) <= sinks)[:, None, None]
        return (torch.arange(self.past + self.n_new, device=self.device) < sinks)[None, None, None]

    def _check_sinks(self, sinks: int) -> None:
        if self.capacity is None or self.padding is None or bool(self.padding[:, :sinks].all()):
            return
        raise ValueError(
            "attention_sinks and rows that are padded on the left cannot share a cache, which keeps the first columns; "
            "generate rows of one length, or one row at a time"
        )

    def _bias(self, visible: Tensor, apart: Tensor, slopes: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """-slope |i - j| where j is visible: [B or 1, N, T, S]."""
        wide = torch.promote_types(dtype, torch.float32)
        steep = torch.tensor(slopes, dtype=wide, device=self.device)[:, None, None]
        return (-steep * apart.abs()).to(dtype).masked_fill(~visible, torch.finfo(dtype).min)
