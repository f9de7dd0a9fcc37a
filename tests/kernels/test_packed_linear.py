"""The linear layer of decoding equals PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from stackwise.kernels import packed_linear as kernel
from stackwise.kernels.packed_linear import packed_linear, packed_linear_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("blocked", [False, True])
def test_it_gives_what_a_linear_layer_gives(
    dtype: torch.dtype, rows: int, bias: bool, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "SMALL", 0)
    if not blocked:
        monkeypatch.setattr(kernel, "_blocked_product", lambda: None)
    torch.manual_seed(0)
    weight = torch.randn(65, 24).to(dtype)
    shift = torch.randn(65).to(dtype) if bias else None
    x = torch.randn(rows, 24).to(dtype)
    with torch.no_grad():
        got = packed_linear(weight, shift, rows)(x)
        torch.testing.assert_close(got, packed_linear_reference(x, weight, shift))


def test_the_copy_does_not_follow_the_weight() -> None:
    weight = torch.randn(8, 4)
    layer = packed_linear(weight, None, 1)
    x = torch.randn(1, 4)
    before = layer(x)
    weight.zero_()
    assert torch.equal(layer(x), before)
