"""A linear layer prepared for many calls with the same few rows, as in token-by-token decoding.

y = x W^T + b

With so few rows the time goes into reading W, and PyTorch's general product reads it at about half the speed of the
memory. oneDNN's product over W in oneDNN's own blocked layout reads it at nearly full speed, at some eight
microseconds per call. A single row times a small W, or where oneDNN is missing, takes W^T stored row by row. Both
keep a copy of W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 2**17
"""Numbers in a matrix up to which one row is multiplied faster than oneDNN is called."""


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


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """weight [O, I], bias [O] or null -> a function from x [rows, I] to [rows, O]. No gradients flow through it.

    The copy is made now: later changes of `weight` are not seen. For other numbers than fp32 on the CPU the product
    is PyTorch's own.
    """
    packs = weight.device.type == "cpu" and weight.dtype == torch.float32
    product = _blocked_product() if packs else None
    if product is not None and not (rows == 1 and weight.numel() <= SMALL):
        # the layout is chosen for a number of rows; the one for 16 also serves one row best
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), max(rows, 16))
        return lambda x_RI: product(x_RI, blocked, bias, "none", [], "")
    weight_IO = weight.t().contiguous() if packs and rows == 1 else weight.t()
    if bias is None:
        return lambda x_RI: torch.mm(x_RI, weight_IO)
    return lambda x_RI: torch.addmm(bias, x_RI, weight_IO)


def packed_linear_reference(x_RI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by PyTorch's own layer, for tests."""
    return F.linear(x_RI, weight, bias)
