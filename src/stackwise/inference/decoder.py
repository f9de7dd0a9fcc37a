"""From token ids to the logits of the next token, with everything already read kept in a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from stackwise.inference.plan import DecodePlan, uncovered
from stackwise.model.rack import Rack


class Decoder:
    """Feeds a causal rack: first whole prompts, then one token per row at a time.

    `capacity` is the number of tokens per row that can be held. Run it without gradients and in eval mode.
    """

    def __init__(self, rack: Rack, rows: int, capacity: int) -> None:
        self.rack, self.rows, self.capacity = rack, rows, capacity
        self.length = 0
        self._planned = uncovered(rack) is None
        self._plan: DecodePlan | None = None

    @property
    def full(self) -> bool:
        """Whether there is no room for another token."""
        return self.length >= self.capacity

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Logits [B, V] after the prompts; whatever was read before is forgotten.

        mask bool [B, T], False = padding, which must be on the left: the last column is real.
        """
        rack, n_tokens = self.rack, ids_BT.shape[1]
        if mask_BT is not None and bool(mask_BT.all()):
            mask_BT = None
        ahead = torch.arange(n_tokens, self.capacity, device=ids_BT.device)[None]
        positions = None
        if mask_BT is not None:
            # padding takes no position, so that a padded prompt reads as the bare one
            positions = (mask_BT.long().cumsum(1) - 1).clamp_min(0)
            ahead = ahead - (~mask_BT).sum(1, keepdim=True)
        self._cache = rack.make_cache(self.rows, n_tokens if self._planned else self.capacity)
        hidden = rack.forward_features(ids_BT, mask_BT, position_ids=positions, cache=self._cache)
        self.length = self._n_prompt = n_tokens
        self._positions, self._mask = ahead, mask_BT
        self._started = False
        return rack.io.head(hidden[:, -1])

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token per row. One more than `capacity` is a ValueError."""
        if self.full:
            raise ValueError(f"the cache holds {self.capacity} tokens and is full")
        if self._planned:
            # inference mode saves some bookkeeping; modules run without it, as they may cache what training needs
            with torch.inference_mode():
                logits = self._start_plan().step(ids_B)
        else:
            at = self.length - self._n_prompt
            positions = self._positions[:, at, None].expand(self.rows, 1)
            mask = self._mask
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(self.rows, at + 1)), dim=1)
            hidden = self.rack.forward_features(
                ids_B[:, None], mask, position_ids=positions, cache=self._cache
            )
            logits = self.rack.io.head(hidden[:, -1])
        self.length += 1
        return logits

    def _start_plan(self) -> DecodePlan:
        if self._plan is None:  # made at the first step: a single new token needs no copy of the weights
            self._plan = DecodePlan(self.rack, self.rows)
        if not self._started:
            self._plan.start(self._cache, self._positions, self._mask)
            self._started = True
        return self._plan
