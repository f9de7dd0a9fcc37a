"""Operations on tensors without storage, answered from what was answered before to equal questions.

What an operation makes of its inputs (shapes, strides, number formats, and what shares memory with what) depends on
those of the inputs alone. PyTorch's fake tensors remember too, but need longer to find an answer than it took to give:
they allow for far more than a training step asks.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

DEVICE = torch.ops.prim.device.default
CPU = torch.device("cpu")
LIMIT = 100_000
"""Answers kept at most; a plan of many shapes asks a few thousand questions."""


class Look(NamedTuple):
    """A tensor, but for its numbers and its place in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype
    is_conj: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Look:
        return cls(
            tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.is_conj()
        )


class Made(NamedTuple):
    """A tensor of an answer: input number `same` itself, a view of input number `view_of`, or one of its own."""

    look: Look
    same: int | None
    view_of: int | None


class Answer(NamedTuple):
    """What came out: tensors (`Made`) and other values, and how they are nested."""

    leaves: list[Any]
    nesting: TreeSpec


_ANSWERS: dict[Hashable, Answer | None] = {}
"""By question; null where the question has to be asked every time."""


class Recall(TorchDispatchMode):
    """Goes on top of a `FakeTensorMode`, which is then asked once per question."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        with torch._C._DisableTorchDispatch():
            self._like = vars(FakeTensor(fakes, torch.empty(0, device="meta"), CPU))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, so PyTorch need not wrap every call against it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return CPU if type(args[0]) is FakeTensor else func(*args)
        kwargs = kwargs or {}
        inputs: list[Tensor] = []
        question = (func, _describe(args, inputs), _describe((*kwargs.items(),), inputs))
        if not all(_is_plain(tensor) for tensor in inputs):
            return func(*args, **kwargs)
        try:
            answer = _ANSWERS[question]
        except KeyError:
            out = func(*args, **kwargs)
            if len(_ANSWERS) >= LIMIT:
                _ANSWERS.clear()
            after: list[Tensor] = []
            kept = question == (func, _describe(args, after), _describe((*kwargs.items(),), after))
            _ANSWERS[question] = _answer(out, inputs) if kept else None
            return out
        except TypeError:  # an argument that cannot be compared
            return func(*args, **kwargs)
        return func(*args, **kwargs) if answer is None else self._give(answer, inputs)

    def _give(self, answer: Answer, inputs: list[Tensor]) -> Any:
        unseen = torch._C._DisableTorchDispatch()
        try:
            leaves = [self._make(leaf, inputs) if type(leaf) is Made else leaf for leaf in answer.leaves]
        finally:
            del unseen
        return leaves[0] if answer.nesting.is_leaf() else tree_unflatten(leaves, answer.nesting)

    def _make(self, made: Made, inputs: list[Tensor]) -> Tensor:
        look = made.look
        if made.same is not None:
            return inputs[made.same]
        if made.view_of is None:
            plain = torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")
        else:
            plain = torch.empty(0, dtype=look.dtype, device="meta")
            plain.set_(inputs[made.view_of].untyped_storage(), look.offset, look.shape, look.stride)
        if look.is_conj:
            torch._C._set_conj(plain, True)
        # What FakeTensor's constructor does, without looking at each of its many arguments.
        fake = Tensor._make_subclass(FakeTensor, plain, dispatch_device=True, device_for_backend_keys=CPU)
        vars(fake).update(self._like)
        return fake


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is FakeTensor and tensor.constant is None and tensor.fake_device == CPU


def _describe(value: Any, inputs: list[Tensor]) -> Hashable:
    """Everything about arguments that the answer depends on. Their tensors are collected in `inputs`."""
    if isinstance(value, Tensor):
        inputs.append(value)
        return Look.of(value)
    if isinstance(value, (tuple, list)):
        return tuple([_describe(item, inputs) for item in value])
    return type(value), value  # 1, 1.0 and True are equal, but not alike


def _answer(out: Any, inputs: list[Tensor]) -> Answer | None:
    """What came out as it can be made again; null where it cannot."""
    leaves, nesting = tree_flatten(out)
    places = {tensor.untyped_storage()._cdata: i for i, tensor in enumerate(inputs)}
    listed: list[Any] = []
    own: set[int] = set()
    for leaf in leaves:
        if isinstance(leaf, (torch.dtype, int)):
            listed.append(leaf)
            continue
        if not isinstance(leaf, Tensor) or not _is_plain(leaf) or leaf.is_neg():
            return None
        look, storage = Look.of(leaf), leaf.untyped_storage()
        same = next((i for i, tensor in enumerate(inputs) if tensor is leaf), None)
        view_of = places.get(storage._cdata)
        if same is None and view_of is None:
            if storage._cdata in own or storage.nbytes() != _bytes(look):
                return None
            own.add(storage._cdata)
        listed.append(Made(look, same, view_of))
    return Answer(listed, nesting)


def _bytes(look: Look) -> int:
    """Memory of a tensor that has it for itself."""
    if 0 in look.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(look.shape, look.stride, strict=True))
    return (last + 1) * look.dtype.itemsize if look.offset == 0 else -1
