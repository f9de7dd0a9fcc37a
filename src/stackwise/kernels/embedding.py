"""Looking up rows of a table that is kept in fewer bits than the numbers it gives.

A row's gradient is a sum over all tokens that look it up. In bf16 such a sum stops growing after some hundred terms,
so it is formed in the dtype of the output and rounded once, to the dtype of the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.table_dtype = table.shape[0], table.dtype
        return F.embedding(ids, table).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        total = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, -1, False)
        return None, total.to(ctx.table_dtype), None


def look_up(ids: Tensor, table_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the table: ids of any shape -> [..., D] in `dtype`."""
    return _LookUp.apply(ids, table_VD, dtype)


def look_up_reference(ids: Tensor, table_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by autograd, over a copy of the whole table."""
    return F.embedding(ids, table_VD.to(dtype))
