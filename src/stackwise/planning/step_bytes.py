"""Bytes alive through a training step, operation by operation, by what they are for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stackwise.trunk.ledger import storage_key

__all__ = ["CATEGORIES", "ByteLine", "StepRecorder"]

CATEGORIES = ("weights", "moments", "gradients", "activations", "other")
"""Weights with buffers of modules; moments with step counters; activations: what autograd has saved; other: batches,
and whatever lives for a moment only."""
_ELSEWHERE = "elsewhere"
_STAYS = ("weights", "moments", _ELSEWHERE)


@dataclass
class ByteLine:
    """Bytes by category after every operation that changed them, and where the parts of the step begin.

    `points`: (operation, bytes of each of CATEGORIES). `parts`: (operation, name). `operations`: how many there were.
    """

    points: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    parts: list[tuple[int, str]] = field(default_factory=list)
    operations: int = 0

    @property
    def peak(self) -> tuple[int, dict[str, int]]:
        """(operation, bytes by category) where the most is alive."""
        at, row = max(self.points, key=lambda point: sum(point[1]))
        return at, dict(zip(CATEGORIES, row, strict=True))

    @property
    def most(self) -> dict[str, int]:
        """The most of each category, not all at once."""
        return {name: max(row[i] for _, row in self.points) for i, name in enumerate(CATEGORIES)}

    def thinned(self, most: int) -> list[tuple[int, tuple[int, ...]]]:
        """At most so many points; of each stretch the one with the most bytes."""
        size = -(-len(self.points) // most)
        stretches = [self.points[i : i + size] for i in range(0, len(self.points), max(1, size))]
        return [max(stretch, key=lambda point: sum(point[1])) for stretch in stretches]


class StepRecorder:
    """Records what happens inside the block. Storages count once, whole, on `device` alone; it changes no number.

    `weights` and `moments` are the tensors that are there all the time; gradients are those of `trained`. What
    `elsewhere` gives has its home off the device and does not count, even where both are one memory. What an operation uses inside itself is not seen. Recording is slow: time nothing with it.
    """

    def __init__(
        self,
        device: torch.device,
        weights: Iterable[Tensor],
        moments: Callable[[], Iterable[Tensor]],
        trained: Iterable[Tensor],
        elsewhere: Callable[[], Iterable[Tensor]] = list,
    ) -> None:
        self.line = ByteLine()
        self._device, self._trained, self._moments = device, list(trained), moments
        self._now = dict.fromkeys(CATEGORIES, 0)
        self._of: dict[int, tuple[str, int]]  # storage -> category, bytes
        self._references: dict[int, Any] = {}
        self._stack = ExitStack()
        self._of = {}
        self._elsewhere = elsewhere
        for tensor in elsewhere():
            self._leave_out(tensor)
        for tensor in weights:
            self._put(tensor, "weights", unless=(_ELSEWHERE,))

    def part(self, name: str) -> None:
        """A part of the step begins."""
        self.line.parts.append((self.line.operations, name))
        for tensor in self._elsewhere():
            self._leave_out(tensor)
        for tensor in self._moments():  # an optimizer makes them at its first step
            self._put(tensor, "moments", unless=(_ELSEWHERE,))

    def __enter__(self) -> StepRecorder:
        self.part("start")
        self._sample()
        hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)
        self._stack.enter_context(hooks)
        for parameter in self._trained:
            handle = parameter.register_post_accumulate_grad_hook(self._graduated)
            self._stack.callback(handle.remove)
        self._stack.enter_context(_Operations(self._made, self._after))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._sample()
        self._references.clear()

    def _saved(self, tensor: Tensor) -> Tensor:
        self._put(tensor, "activations", unless=_STAYS)
        return tensor

    def _graduated(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if self._of.get(storage_key(parameter), ("", 0))[0] == _ELSEWHERE:
            self._leave_out(parameter.grad)
        else:
            self._put(parameter.grad, "gradients", unless=_STAYS)

    def _made(self, tensor: Tensor) -> None:
        self._put(tensor, "other", unless=(*CATEGORIES, _ELSEWHERE))

    def _after(self) -> None:
        self.line.operations += 1
        self._sample()

    def _put(self, tensor: Tensor, category: str, unless: tuple[str, ...] = ()) -> None:
        """Count the storage of a tensor in a category; it stays where it is if that is one of `unless`."""
        if tensor.device.type != self._device.type:
            return
        key = storage_key(tensor)
        if key in self._of:
            before, size = self._of[key]
            if before not in unless and before != category:
                self._of[key] = (category, size)
                self._now[before] -= size
                self._now[category] += size
            return
        storage = tensor.untyped_storage()
        self._follow(storage, key, category, storage.nbytes())
        self._now[category] += storage.nbytes()

    def _follow(self, storage: torch.UntypedStorage, key: int, category: str, size: int) -> None:
        """Until it is freed, and its key may be another's."""

        def freed(_: Any) -> None:
            category, size = self._of.pop(key)
            if category != _ELSEWHERE:
                self._now[category] -= size
            self._references.pop(key, None)

        self._references[key] = weakref.ref(storage, freed)
        self._of[key] = (category, size)

    def _leave_out(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        category, size = self._of.get(key, (_ELSEWHERE, 0))
        if category != _ELSEWHERE:
            self._now[category] -= size
            self._of[key] = (_ELSEWHERE, 0)
        elif key not in self._of:
            self._follow(tensor.untyped_storage(), key, _ELSEWHERE, 0)

    def _sample(self) -> None:
        row = tuple(self._now.values())
        if not self.line.points or self.line.points[-1][1] != row:
            self.line.points.append((self.line.operations, row))


class _Operations(TorchDispatchMode):
    """Tells of every tensor that an operation gives back, and of the end of every operation."""

    def __init__(self, made: Callable[[Tensor], None], after: Callable[[], None]) -> None:
        super().__init__()
        self._made, self._after = made, after

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._made(leaf)
        self._after()
        return out
