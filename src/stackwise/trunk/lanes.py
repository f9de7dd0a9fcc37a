"""Copies that run beside the computation.

On CUDA a lane is a stream of its own. It starts a copy once the computation has passed a mark, and the computation
waits for the mark behind the copy. Elsewhere copies are done at once and marks mean nothing, so that everything but
the calls of this module is the same code on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Mark = Any
"""A point in the order of work on a device; null: nothing to wait for."""


class Lane:
    """A queue of copies, each done before the next begins. This one does them at once."""

    pins = False
    """Whether host memory should be page-locked for the copies to run beside the computation."""

    def run(self, copy: Callable[[], object], *after: Mark) -> Mark:
        """Queue a copy for when the marks `after` have been passed; returns the mark behind it."""
        copy()
        return None

    def mark(self) -> Mark:
        """The point that the computation has been given work up to."""
        return None

    def wait(self, mark: Mark) -> None:
        """Let the computation wait for a mark."""

    def settle(self, mark: Mark) -> None:
        """Let this thread wait for a mark."""

    def uses(self, tensor: Tensor) -> None:
        """Do not give a tensor's memory to others before the copies queued by now are done."""


class CudaLane(Lane):
    """A side stream with events."""

    pins = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def run(self, copy: Callable[[], object], *after: Mark) -> Mark:
        with torch.cuda.stream(self.stream):
            for mark in after:
                if mark is not None:
                    self.stream.wait_event(mark)
            copy()
            return self.stream.record_event()

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def settle(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    def uses(self, tensor: Tensor) -> None:
        tensor.record_stream(self.stream)


def lane_to(device: torch.device) -> Lane:
    """A new lane between the host and a device."""
    return CudaLane(device) if device.type == "cuda" else Lane()


def host_like(tensor: Tensor, pinned: bool) -> Tensor:
    """Empty host memory of a tensor's shape and dtype."""
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned)
