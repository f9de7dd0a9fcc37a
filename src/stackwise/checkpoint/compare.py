"""What differs between two commits: parts by their hashes, then tensors by their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.store import Store


@dataclass(frozen=True)
class TensorChange:
    """A tensor whose bytes differ, or that only one commit has."""

    name: str
    state: Literal["added", "removed", "changed", "other shape or dtype"]
    distance: float | None = None
    """Largest absolute difference of two values, where both are numbers of one shape; NaN where one is NaN."""


@dataclass(frozen=True)
class PartChange:
    """A part that differs. A part of equal hash is equal in every bit and is not listed."""

    name: str
    state: Literal["added", "removed", "changed"]
    bytes_before: int
    bytes_after: int
    tensors: tuple[TensorChange, ...]
    n_tensors: int
    """How many tensors the part has after, or had where it is gone."""


def compare(store: Store, before: Commit, after: Commit, other: Store | None = None) -> list[PartChange]:
    """The parts that differ, by name. `after` is a commit of `other` (null: of `store` too).

    Reads the objects of changed parts, two at a time. Raises CheckpointError where one is damaged.
    """
    changes = []
    for name in sorted(before.parts.keys() | after.parts.keys()):
        a, b = before.parts.get(name), after.parts.get(name)
        if a is not None and b is not None:
            if a.sha256 == b.sha256:
                continue
            old, new = store.load(before, name), (other or store).load(after, name)
            tensors = [_tensor_change(t, old.get(t), new.get(t)) for t in sorted(old.keys() | new.keys())]
            changed = tuple(change for change in tensors if change is not None)
            changes.append(PartChange(name, "changed", a.bytes, b.bytes, changed, len(new)))
        elif b is not None:
            listed = tuple(TensorChange(t.name, "added") for t in b.tensors)
            changes.append(PartChange(name, "added", 0, b.bytes, listed, len(listed)))
        elif a is not None:
            listed = tuple(TensorChange(t.name, "removed") for t in a.tensors)
            changes.append(PartChange(name, "removed", a.bytes, 0, listed, len(listed)))
    return changes


def _tensor_change(name: str, a: Tensor | None, b: Tensor | None) -> TensorChange | None:
    if a is None or b is None:
        return TensorChange(name, "added" if a is None else "removed")
    if a.shape != b.shape or a.dtype != b.dtype:
        return TensorChange(name, "other shape or dtype")
    if torch.equal(_bytes(a), _bytes(b)):
        return None
    return TensorChange(name, "changed", float((a.double() - b.double()).abs().max()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def facts_of(tensor: Tensor, values: int = 8) -> dict[str, Any]:
    """Shape, dtype, the first values, and statistics over the finite ones (population standard deviation)."""
    flat = tensor.reshape(-1)
    numbers = flat.double()
    finite = numbers[numbers.isfinite()]
    known = finite.numel() > 0
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "count": tensor.numel(),
        "nan": int(numbers.isnan().sum()),
        "infinite": int(numbers.isinf().sum()),
        "zero": int((numbers == 0).sum()),
        "min": float(finite.min()) if known else None,
        "max": float(finite.max()) if known else None,
        "mean": float(finite.mean()) if known else None,
        "std": float(finite.std(correction=0)) if known else None,
        "norm": float(finite.square().sum().sqrt()) if known else None,
        "values": [
            number if abs(number) < float("inf") else str(number) for number in numbers[:values].tolist()
        ],
    }


def config_changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]] | None:
    """(key, before, after) of the settings that two manifests record (`meta["config"]`); null where one has none."""
    a, b = before.get("config"), after.get("config")
    if a is None or b is None:
        return None
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
