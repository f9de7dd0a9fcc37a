"""Which device's route a kernel takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_counted_as: str | None = None


def device_kind(x: Tensor) -> str:
    """cpu, cuda or mps: where arithmetic on `x` runs, or, while a run is only counted, where it would run."""
    return _counted_as or x.device.type


@contextmanager
def counted_as(kind: str) -> Iterator[None]:
    """Inside, kernels take the routes of a kind of device that need not be present; for tensors without storage."""
    global _counted_as
    before, _counted_as = _counted_as, kind
    try:
        yield
    finally:
        _counted_as = before
