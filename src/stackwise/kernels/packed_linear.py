"""A linear layer prepared for many calls with the same few rows, as in token-by-token decoding.

y = x W^T + b

With so few rows the time goes into reading W, and PyTorch's general product reads it at about half the speed of the
memory. One row: a matrix-vector product over W^T, stored row by row. Several rows: oneDNN's product over W in
oneDNN's own blocked layout. Both keep a copy of W.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@lru_cache(maxsize=1)
def _blocked_product() -> Any:
    """oneDNN's product over blocked weights; null where this build of PyTorch or this processor lacks it."""
    if not torch.backends.mkldnn.is_available():
        return None
    x, weight = torch.ones(2, 16), torch.ones(16, 16)
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, 2)
        y = product(x, blocked, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return product if torch.equal(y, x @ weight.t()) else None


class PackedLinear:
    """weight [O, I], bias [O] or null; called with x [rows, I] -> [rows, O]. Without gradients.

    The copy is made now: later changes of `weight` are not seen. For other numbers than fp32 on the CPU the product
    is PyTorch's own.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        packs = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.bias = bias
        self.product = _blocked_product() if packs and rows > 1 else None
        if self.product is not None:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        else:
            self.weight = weight.t().contiguous() if packs and rows == 1 else weight.t()

    def __call__(self, x_RI: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(x_RI, self.weight, self.bias, "none", [], "")
        if self.bias is None:
            return torch.mm(x_RI, self.weight)
        return torch.addmm(self.bias, x_RI, self.weight)


def packed_linear_reference(x_RI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by PyTorch's own layer, for tests."""
    return F.linear(x_RI, weight, bias)
