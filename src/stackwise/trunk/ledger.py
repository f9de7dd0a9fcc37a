"""Bytes that a step holds, by item: now, and at most."""

from __future__ import annotations

from torch import Tensor

DEVICE_ITEMS = ("buffers", "gradients", "activations")
"""What comes and goes on the device within a step. Other items are off the device."""


def storage_key(tensor: Tensor) -> int:
    """Names the memory behind a tensor for as long as it lives; tensors that share memory share the name."""
    return int(tensor.untyped_storage()._cdata)


class Ledger:
    """Bytes held now (`live`) and at most (`most`) by item, and the largest sum of the items on the device (`peak`)."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.peak = 0
        self._holders: dict[tuple[str, int], int] = {}

    def add(self, item: str, n_bytes: int) -> None:
        """Bytes came, or went where the number is negative."""
        self.live[item] = now = self.live.get(item, 0) + n_bytes
        self.most[item] = max(self.most.get(item, 0), now)
        self.peak = max(self.peak, self.on_device)

    @property
    def on_device(self) -> int:
        """Bytes on the device now."""
        return sum(self.live.get(item, 0) for item in DEVICE_ITEMS)

    def restart(self) -> None:
        """Forget the maxima; what is held stays held."""
        self.most = dict(self.live)
        self.peak = self.on_device

    def _come(self, item: str, key: int, n_bytes: int) -> None:
        self._holders[item, key] = count = self._holders.get((item, key), 0) + 1
        if count == 1:
            self.add(item, n_bytes)

    def _go(self, item: str, key: int, n_bytes: int) -> None:
        self._holders[item, key] -= 1
        if not self._holders[item, key]:
            del self._holders[item, key]
            self.add(item, -n_bytes)


class Held:
    """A tensor whose memory counts as long as this object lives; memory that several hold counts once per item."""

    __slots__ = ("_key", "_ledger", "_size", "item", "tensor")

    def __init__(self, ledger: Ledger, item: str, tensor: Tensor) -> None:
        self._ledger, self.item, self.tensor = ledger, item, tensor
        self._key, self._size = storage_key(tensor), tensor.untyped_storage().nbytes()
        ledger._come(item, self._key, self._size)

    def __del__(self) -> None:
        self._ledger._go(self.item, self._key, self._size)
