"""Bytes of the tensors that are alive, operation by operation; for real tensors and for tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, `now` is the size of all storages made since and still alive, `peak` the largest `now` so far.

    Every storage counts once, whole, from the operation that made it until it is freed. `known` are tensors that were
    there before and do not count, and neither do the bytes that `elsewhere` speaks of. What an operation uses inside
    itself is not seen. Storages belong to the `owner` set when they are made; `changes` is what each owner's storages
    came to since `start`.
    """

    def __init__(self, known: Iterable[Tensor] = (), elsewhere: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self.elsewhere = elsewhere
        self.made = self.peak = 0
        self.owner = -1
        self.changes: dict[int, int] = {}
        self._alive: dict[int, Any] = {}
        for tensor in known:
            self._take(tensor, counts=False)

    @property
    def now(self) -> int:
        """Bytes alive."""
        return self.made - self.elsewhere()

    def start(self, owner: int) -> None:
        """Begin a new peak at the present height, and new changes."""
        self.owner, self.peak, self.changes = owner, self.now, {}

    def _take(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        n_bytes, owner = storage.nbytes() if counts else 0, self.owner

        def freed(_: Any) -> None:
            del self._alive[key]
            self._change(owner, -n_bytes)

        self._alive[key] = weakref.ref(storage, freed)
        self._change(owner, n_bytes)

    def _change(self, owner: int, n_bytes: int) -> None:
        self.made += n_bytes
        self.peak = max(self.peak, self.now)
        self.changes[owner] = self.changes.get(owner, 0) + n_bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, so PyTorch need not wrap every call against it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._take(leaf)
        return out
