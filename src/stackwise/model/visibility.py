"""Who sees whom: causality, padding and documents, always combined.

A query row that sees no key must give 0. Masks are boolean, True = visible, and are built once per forward pass and
kind of attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """What attention needs.

    `is_causal`: T = S and query t sees no key after t. `visible` [B or 1, 1, T, S]: all that may be seen, causality
    included; null when `is_causal` says all. `dead` [B, 1, T, 1]: queries that see nothing; null when there are none.
    """

    is_causal: bool
    visible: Tensor | None
    dead: Tensor | None


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
        self._made: dict[bool, Mask] = {}
        self._same: list[Tensor] = []

    @property
    def present(self) -> Tensor | None:
        """bool [B, T]: which of the new tokens are real; null: all."""
        return None if self.padding is None else self.padding[:, self.past :]

    def mask(self, causal: bool) -> Mask:
        if causal not in self._made:
            self._made[causal] = self._make(causal)
        return self._made[causal]

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

    def _make(self, causal: bool) -> Mask:
        if self.padding is None and self.documents is None:
            if not causal or self.n_new == 1:
                return Mask(False, None, None)  # a single new token sees all that came before
            if self.past == 0:
                return Mask(True, None, None)
        total = self.past + self.n_new
        visible = torch.ones(1, 1, self.n_new, total, dtype=torch.bool, device=self.device)
        if causal:
            visible = visible.tril(diagonal=self.past)
        if self.documents is not None:
            visible = visible & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        dead = None
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, :]
            dead = ~visible.any(dim=-1, keepdim=True)
        return Mask(causal and self.past == 0, visible, dead)
