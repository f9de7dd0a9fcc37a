"""Whether tensors hold numbers only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating tensors that hold an infinity or a NaN; one pass over their memory."""
    floating = [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point()]
    # A sum is not finite where a summand is not; where all are, it rarely overflows, and is looked at again.
    sums = [_wide(tensor).sum() for _, tensor in floating]
    return [
        name
        for (name, tensor), finite in zip(floating, _all_finite(sums), strict=True)
        if not finite and not _wide(tensor).isfinite().all()
    ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def _all_finite(values: list[Tensor]) -> list[bool]:
    """One answer per number, asked of each device once."""
    answers = dict.fromkeys(range(len(values)), True)
    for device in {value.device for value in values}:
        places = [i for i, value in enumerate(values) if value.device == device]
        found = torch.stack([values[i].double() for i in places]).isfinite().tolist()
        answers.update(zip(places, found, strict=True))
    return list(answers.values())
