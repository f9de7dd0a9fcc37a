"""What a rack keeps of tokens already seen, one cache per block; attention makes the kind it needs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class BlockCache:
    """Of one block. `length`: tokens seen so far.

    With a `window` no more than the first `sinks` tokens and the last `window` others are kept: token j of the others
    in slot sinks + (j - sinks) mod window (`visibility.held_tokens` says which token a slot holds).
    """

    def __init__(self, window: int | None = None, sinks: int = 0) -> None:
        self.length, self.window, self.sinks = 0, window, sinks
        self._last: dict[str, Tensor] = {}

    def room(self, capacity: int) -> int:
        """Entries that a buffer for `capacity` tokens needs."""
        return capacity if self.window is None else min(capacity, self.sinks + self.window)

    def store(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Put T new tokens behind those seen, in dimension -2 of `buffer`; returns what the new ones may look at.

        Call `advance` when all buffers of the block are filled. More tokens than there is room for: ValueError.
        """
        n_new, size = new.shape[-2], buffer.shape[-2]
        start, stop = self.length, self.length + n_new
        if stop > size and (self.window is None or size < self.sinks + self.window):
            raise ValueError(f"the cache holds {size} tokens, {stop} were asked for")
        if self.window is None:
            buffer[..., start:stop, :] = new
            return buffer[..., :stop, :]
        if n_new == 1:
            slot = start if start < self.sinks else self.sinks + (start - self.sinks) % self.window
            buffer[..., slot, :] = new[..., 0, :]
            return buffer[..., : min(stop, size), :]
        seen = (
            new if start == 0 else torch.cat((buffer[..., : min(start, size), :].to(new.dtype), new), dim=-2)
        )
        tokens = torch.arange(start, stop, device=new.device)
        tokens = tokens[(tokens < self.sinks) | (tokens >= stop - self.window)]
        slots = torch.where(tokens < self.sinks, tokens, self.sinks + (tokens - self.sinks) % self.window)
        buffer[..., slots, :] = new[..., tokens - start, :].to(buffer.dtype)
        return seen

    def advance(self, n_new: int) -> None:
        """The new tokens are in all buffers."""
        self.length += n_new

    def extend(self, name: str, x_BTD: Tensor, keep: int) -> Tensor:
        """The last inputs kept under `name`, followed by the T new ones; at most `keep` of them are kept for next time."""
        seen = torch.cat((self._last[name], x_BTD), dim=1) if name in self._last else x_BTD
        self._last[name] = seen[:, -keep:]
        return seen

    def repeated(self, rows: int) -> BlockCache:
        """The same of every row, `rows` times, in memory of its own. All tensors have the rows first."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(twin, name, value.repeat_interleave(rows, 0))
        twin._last = {name: value.repeat_interleave(rows, 0) for name, value in self._last.items()}
        return twin

    def kept(self, name: str) -> Tensor | None:
        """The inputs kept under `name`, [B, at most `keep`, D]; null when there are none."""
        return self._last.get(name)


class KeyValueCache(BlockCache):
    """Keys and values: buffers [B, N_kv, capacity, H], filled from the left; with a window they are bounded.

    Values are as wide as keys unless `value_width` says otherwise.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        window: int | None = None,
        sinks: int = 0,
        value_width: int | None = None,
    ) -> None:
        super().__init__(window, sinks)
        shape = (batch, heads, self.room(capacity))
        self.keys = torch.empty(*shape, width, dtype=dtype, device=device)
        self.values = torch.empty(*shape, value_width or width, dtype=dtype, device=device)

    def update(self, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append T tokens; returns the keys and values that they may look at, themselves included."""
        seen = self.store(self.keys, k_BNTH), self.store(self.values, v_BNTH)
        self.advance(k_BNTH.shape[2])
        return seen


class LatentCache(BlockCache):
    """One vector per token for keys and values of all heads: a buffer [B, capacity, C], bounded under a window."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        super().__init__(window, sinks)
        self.held = torch.empty(batch, self.room(capacity), width, dtype=dtype, device=device)

    def update(self, x_BTC: Tensor) -> Tensor:
        """Append T tokens; returns those that they may look at, themselves included."""
        seen = self.store(self.held, x_BTC)
        self.advance(x_BTC.shape[1])
        return seen


class StateCache(BlockCache):
    """Sums over all tokens seen, whatever their number: [B, heads, D, V] relative to exp(top), top [B, heads]."""

    def __init__(
        self,
        batch: int,
        heads: int,
        features: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.sums = torch.zeros(batch, heads, features, width, dtype=dtype, device=device)
        self.top = torch.full((batch, heads), -torch.inf, dtype=dtype, device=device)

    def hold(self, sums: Tensor, top: Tensor, count: int) -> None:
        """Take the sums that `count` more tokens have led to."""
        self.sums, self.top = sums, top
        self.advance(count)


class RackCache:
    """The caches of all blocks of a rack, in forward order, made for up to `capacity` tokens (null: nobody said)."""

    def __init__(self, blocks: list[BlockCache], capacity: int | None = None) -> None:
        self.blocks, self.capacity = blocks, capacity

    @property
    def length(self) -> int:
        """Tokens held."""
        return max((block.length for block in self.blocks), default=0)

    def repeated(self, rows: int) -> RackCache:
        """The same for each row `rows` times: what several texts begin with is read once."""
        return RackCache([block.repeated(rows) for block in self.blocks], self.capacity)
