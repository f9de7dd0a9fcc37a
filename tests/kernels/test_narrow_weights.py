"""Weights kept in bf16 under a wider computation: values are exact, gradients are rounded once."""

from __future__ import annotations

import pytest
import torch

from stackwise.kernels.embedding import look_up, look_up_reference
from stackwise.kernels.linear import linear, linear_reference


def close_to_bf16(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether `got` is `want` rounded to bf16, but for the last digit and for what sums in fp32 lose near zero."""
    lost = 1e-6 + 1e-5 * float(want.abs().max())
    return bool(((got.double() - want.double()).abs() <= want.double().abs() * 2**-7 + lost).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(5, 7, 3), (300, 64, 96)])
def test_a_linear_layer_computes_in_the_dtype_of_its_input(rows, inner, outer, bias):
    x = torch.randn(rows, inner, requires_grad=True)
    weight = torch.randn(outer, inner).bfloat16().requires_grad_()
    offset = torch.randn(outer, requires_grad=True) if bias else None
    y = linear(x, weight, offset)
    assert y.dtype == torch.float32
    y.square().sum().backward()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, offset)]
    want = linear_reference(*wide)
    want.square().sum().backward()
    torch.testing.assert_close(y.double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad.double(), wide[0].grad, atol=1e-3, rtol=1e-4)
    assert weight.grad.dtype == torch.bfloat16
    assert close_to_bf16(weight.grad, wide[1].grad)
    if bias:
        torch.testing.assert_close(offset.grad.double(), wide[2].grad, atol=1e-3, rtol=1e-4)


def test_no_wide_copy_of_a_weight_is_kept_for_the_backward_pass():
    weight = torch.randn(96, 64).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(torch.randn(5, 64, requires_grad=True), weight)
    assert [t.dtype for t in saved if t.numel() == weight.numel()] == [torch.bfloat16]


def test_a_rows_gradient_is_summed_before_it_is_rounded():
    """Four thousand tokens of three kinds; a sum in bf16 would stop at a few hundred."""
    ids = torch.randint(0, 3, (4, 1000))
    table = torch.randn(5, 8).bfloat16().requires_grad_()
    wide = table.detach().clone().float().requires_grad_()
    weights = torch.rand(4, 1000, 8)
    rows = look_up(ids, table, torch.float32)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, look_up_reference(ids, table, torch.float32))
    (rows * weights).sum().backward()
    (look_up_reference(ids, wide, torch.float32) * weights).sum().backward()
    assert table.grad.dtype == torch.bfloat16
    assert close_to_bf16(table.grad, wide.grad)
    assert table.grad[3:].abs().max() == 0
