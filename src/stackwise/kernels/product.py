"""The one place that decides who multiplies fp32 matrices on the CPU.

PyTorch gives fp32 products to MKL, which on AMD processors leaves AVX-512 unused; oneDNN, which PyTorch carries as
well, uses it and is twice as fast there. Both compute in full fp32. Elsewhere, for other dtypes, for small products
(oneDNN takes some microseconds per call) and while compiling, products are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stackwise.kernels.device import device_kind

WORTH_IT = 2**20
"""Multiplications from which oneDNN's faster arithmetic outweighs its dearer call."""

WORTH_A_KERNEL = 2**28
"""The same where the shape is likely to be new: oneDNN makes a kernel for every shape, which takes about a millisecond."""

_allowed = True
_worth_it = WORTH_IT


@lru_cache(maxsize=1)
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's a b^T + bias for plain tensors; null where it would not be faster or this PyTorch lacks it."""
    able = torch.cpu.get_capabilities()
    if not (torch.backends.mkldnn.is_available() and able.get("avx512_f") and "AMD" in able["cpu_name"]):
        return None
    try:
        product: Any = torch.ops.mkldnn._linear_pointwise.default
        ones = product(torch.ones(2, 3), torch.ones(4, 3), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return product if torch.equal(ones, torch.full((2, 4), 3.0)) else None


@contextmanager
def pytorch_products() -> Iterator[None]:
    """Inside, all products are PyTorch's own; for measuring what the other route gains."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@contextmanager
def new_shapes() -> Iterator[None]:
    """Inside, shapes of products change from step to step."""
    global _worth_it
    before, _worth_it = _worth_it, WORTH_A_KERNEL
    try:
        yield
    finally:
        _worth_it = before


def prefers_onednn(rows: int, inner: int, columns: int, *operands: Tensor) -> bool:
    """Whether a [rows, inner] x [inner, columns] product of these tensors goes to oneDNN."""
    return (
        _allowed
        and rows * inner * columns >= _worth_it
        and all(x.dtype == torch.float32 and device_kind(x) == "cpu" for x in operands)
        and not torch.compiler.is_compiling()
        and _onednn() is not None
    )


def product(a_NK: Tensor, b_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """a b^T + bias -> [N, M]. Any strides; no autograd, see `linear` for that."""
    if prefers_onednn(a_NK.shape[0], a_NK.shape[1], b_MK.shape[0], a_NK, b_MK):
        multiply = _onednn()
        assert multiply is not None
        return multiply(a_NK, b_MK, bias_M, "none", [], "")
    if bias_M is None:
        return torch.mm(a_NK, b_MK.t())
    return torch.addmm(bias_M, a_NK, b_MK.t())
