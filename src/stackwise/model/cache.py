"""What a rack keeps of tokens already seen, one cache per block; attention makes the kind it needs."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockCache:
    """Of one block. `length`: tokens seen so far."""

    def __init__(self) -> None:
        self.length = 0
        self._last: dict[str, Tensor] = {}

    def extend(self, name: str, x_BTD: Tensor, keep: int) -> Tensor:
        """The last inputs kept under `name`, followed by the T new ones; at most `keep` of them are kept for next time."""
        seen = torch.cat((self._last[name], x_BTD), dim=1) if name in self._last else x_BTD
        self._last[name] = seen[:, -keep:]
        return seen

    def kept(self, name: str) -> Tensor | None:
        """The inputs kept under `name`, [B, at most `keep`, D]; null when there are none."""
        return self._last.get(name)


class KeyValueCache(BlockCache):
    """Keys and values: buffers [B, N_kv, capacity, H], filled from the left."""

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.keys = torch.empty(batch, heads, capacity, width, dtype=dtype, device=device)
        self.values = torch.empty(batch, heads, capacity, width, dtype=dtype, device=device)

    def update(self, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append T tokens; returns everything held so far as views."""
        start, stop = self.length, self.length + k_BNTH.shape[2]
        if stop > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} tokens, {stop} were asked for")
        self.keys[:, :, start:stop] = k_BNTH
        self.values[:, :, start:stop] = v_BNTH
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class LatentCache(BlockCache):
    """One vector per token for keys and values of all heads: a buffer [B, capacity, C], filled from the left."""

    def __init__(
        self, batch: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.held = torch.empty(batch, capacity, width, dtype=dtype, device=device)

    def update(self, x_BTC: Tensor) -> Tensor:
        """Append T tokens; returns everything held so far as a view."""
        start, stop = self.length, self.length + x_BTC.shape[1]
        if stop > self.held.shape[1]:
            raise ValueError(f"the cache holds {self.held.shape[1]} tokens, {stop} were asked for")
        self.held[:, start:stop] = x_BTC
        self.length = stop
        return self.held[:, :stop]


class RackCache:
    """The caches of all blocks of a rack, in forward order, made for up to `capacity` tokens (null: nobody said)."""

    def __init__(self, blocks: list[BlockCache], capacity: int | None = None) -> None:
        self.blocks, self.capacity = blocks, capacity

    @property
    def length(self) -> int:
        """Tokens held."""
        return max((block.length for block in self.blocks), default=0)
