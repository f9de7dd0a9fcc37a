"""States a model runs in: for its answers in the middle of training, and in a number format of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Everything below `module` in eval mode; afterwards each part is as it was.

    A plain `train()` at the end would also switch dropout on in frozen stacks.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def autocast_to(dtype: str, device: torch.device) -> Iterator[None]:
    """Autocast to a dtype by name, whatever surrounds it; float32 computes as is."""
    chosen: torch.dtype = getattr(torch, dtype)
    with torch.autocast(
        device.type, dtype=None if chosen == torch.float32 else chosen, enabled=chosen != torch.float32
    ):
        yield
