"""Where the moments of a parameter are kept, and how many bytes they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lives_with_parameter(value: Tensor, group: dict[str, Any]) -> bool:
    """Whether a piece of state belongs on its parameter's device. Counters stay on the CPU for all but fused kernels."""
    return value.dim() > 0 or bool(group.get("fused") or group.get("capturable"))


def place(value: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A loaded piece of state where the optimizer expects it."""
    return value.to(parameter.device if lives_with_parameter(value, group) else "cpu")


def move(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which other work of that device need not wait for."""
    return value.to(device, non_blocking=True)


class HostMoments:
    """Keeps the moments of optimizers in main memory, and brings them to the device around each step.

    Optimizers that hold one parameter each bring one parameter's moments at a time. On a device with memory of its
    own the buffers in main memory are pinned and last as long as this object.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Tensor, str], Tensor] = {}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over the moments of this optimizer; to be called before its first step."""
        optimizer.register_step_pre_hook(self._fetch)
        optimizer.register_step_post_hook(self._store)

    def keep(self, parameter: Tensor, name: str, value: Tensor) -> Tensor:
        """The buffer of one tensor of state, holding `value`; counters are returned as they are."""
        if value.dim() == 0:
            return value
        buffer = self._buffers.get((parameter, name))
        if buffer is None:
            pinned = parameter.device.type == "cuda"
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            self._buffers[parameter, name] = buffer
        return buffer.copy_(value, non_blocking=True)

    def _fetch(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, held in optimizer.state.items():
            for name, value in held.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    held[name] = move(value, parameter.device)

    def _store(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, held in optimizer.state.items():
            for name, value in held.items():
                if isinstance(value, Tensor):
                    held[name] = self.keep(parameter, name, value)

    @staticmethod
    def wait() -> None:
        """Until what was sent to main memory has arrived."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
