"""Running a block again in the backward pass under the conditions of the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from stackwise.model.block import Block


def without_cache(kind: str) -> AbstractContextManager[Any]:
    """The surrounding autocast without its cache, which would keep a narrow copy of every weight of every block."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


class Conditions:
    """Random state and autocast at the time this is made, for a block that reads `x`."""

    def __init__(self, block: Block, x: Tensor) -> None:
        self.kind = x.device.type
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind) if self.autocast else None
        self.random: tuple[Tensor, list[int], list[Tensor]] | None = None
        if any(module.training for module in block.modules()):  # nothing is drawn in eval mode
            self.random = (torch.get_rng_state(), *get_device_states(x))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, as it was; afterwards the random state is what it was before."""
        with ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(self.kind, dtype=self.dtype, cache_enabled=False))
            elif torch.is_autocast_enabled(self.kind):
                stack.enter_context(torch.autocast(self.kind, enabled=False))
            if self.random is not None:
                state, devices, states = self.random
                stack.enter_context(
                    torch.random.fork_rng(devices, device_type=self.kind if devices else "cuda")
                )
                torch.set_rng_state(state)
                if devices:
                    set_device_states(devices, states, device_type=self.kind)
            yield
