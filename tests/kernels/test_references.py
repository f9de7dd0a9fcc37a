"""Every fused operation equals its reference: value and gradients, on fresh random inputs, in three precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackwise.kernels.attention import _BlockedAttention, attention, attention_reference
from stackwise.kernels.linear import linear, linear_reference
from stackwise.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from stackwise.kernels.product import prefers_onednn, pytorch_products
from stackwise.kernels.rms_norm import rms_norm, rms_norm_reference
from stackwise.kernels.short_conv import short_conv, short_conv_reference
from stackwise.model.visibility import Visibility

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def compare(fused, reference, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Fused in `dtype` against the reference in fp64, gradients by a random direction."""
    own = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in own]
    out, expected = fused(*own), reference(*exact)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad(out, own, direction.to(out.dtype))
    wanted = torch.autograd.grad(expected, exact, direction)
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        scale = want.abs().max().clamp_min(1e-6)
        assert (got.double() - want).abs().max() / scale < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 7, 40), (1, 1, 8), (129, 64)])
def test_rms_norm(dtype, shape):
    compare(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        [3 * torch.randn(shape), torch.randn(shape[-1])],
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "width"), [(9, 3), (2, 4), (1, 2), (33, 5)])
def test_short_conv(dtype, length, width):
    compare(short_conv, short_conv_reference, [torch.randn(2, length, 12), torch.randn(width, 12)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_short_conv_both_ways(dtype, length, width):
    def both(x, w):
        return short_conv(x, w, both_ways=True)

    def torch_conv(x, w):
        order = (
            [width // 2 * 2 - 1 - 2 * i for i in range(width // 2)],
            [2 * i for i in range(width // 2 + 1)],
        )
        taps = w[[*order[0], *order[1]]]  # from the earliest token to the last
        y = torch.nn.functional.conv1d(
            x.transpose(1, 2), taps.t().unsqueeze(1), padding=width // 2, groups=x.shape[2]
        )
        return y.transpose(1, 2)

    compare(both, torch_conv, [torch.randn(2, length, 12), torch.randn(width, 12)], dtype)


def test_short_conv_both_ways_stops_at_documents():
    x, w = torch.randn(1, 7, 4), torch.randn(5, 4)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    same = Visibility(7, document_ids=documents).same_document(5)
    expected = torch.cat([short_conv(part, w, both_ways=True) for part in (x[:, :3], x[:, 3:])], 1)
    torch.testing.assert_close(short_conv(x, w, same, both_ways=True), expected)


def test_short_conv_stops_at_documents():
    x, w = torch.randn(1, 8, 4), torch.randn(3, 4)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    same = []
    for lag in (1, 2):
        row = torch.zeros(1, 8, dtype=torch.bool)
        row[:, lag:] = documents[:, lag:] == documents[:, :-lag]
        same.append(row.unsqueeze(-1))
    expected = torch.cat([short_conv(x[:, :3], w), short_conv(x[:, 3:], w)], 1)
    torch.testing.assert_close(short_conv(x, w, same), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(5, 7, 3), (300, 64, 96), (257, 128, 65)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype, rows, inner, outer, bias):
    inputs = [torch.randn(rows, inner), torch.randn(outer, inner) / inner**0.5]
    inputs += [torch.randn(outer)] if bias else []
    compare(linear, linear_reference, inputs, dtype)


def test_linear_under_autocast_keeps_fp32_gradients_of_its_weight():
    x, w = torch.randn(300, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, w)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert w.grad.dtype == x.grad.dtype == torch.float32
    expected = torch.autograd.grad((x @ w.t()).square().sum(), (x, w))
    for got, want in zip((x.grad, w.grad), expected, strict=True):
        assert (got - want).abs().max() / want.abs().max() < 4e-2


def test_both_routes_of_fp32_products_agree():
    x, w = torch.randn(512, 256), torch.randn(300, 256)
    with pytorch_products():
        assert not prefers_onednn(512, 256, 300, x, w)
        plain = linear(x, w)
    torch.testing.assert_close(linear(x, w), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows_per_chunk", [None, 1, 5, 64])
def test_linear_cross_entropy(dtype, rows_per_chunk):
    labels = torch.randint(0, 31, (23,))
    labels[::4] = -100
    compare(
        lambda h, w: linear_cross_entropy(h, w, labels, rows_per_chunk=rows_per_chunk),
        lambda h, w: linear_cross_entropy_reference(h, w, labels),
        [torch.randn(23, 16), torch.randn(31, 16)],
        dtype,
    )


def test_a_loss_without_targets_is_zero_with_zero_gradients():
    h, w = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = linear_cross_entropy(h, w, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert (h.grad == 0).all()
    assert (w.grad == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("length", "masked", "causal"),
    [(5, False, True), (150, False, True), (150, True, True), (40, True, False)],
)
def test_attention(dtype, kv_heads, length, masked, causal):
    visible = None
    if masked:
        visible = torch.rand(3, 1, length, length) < 0.7
        visible |= torch.eye(length, dtype=torch.bool)
        if causal:
            visible &= torch.ones(length, length, dtype=torch.bool).tril()
    inputs = [torch.randn(3, n, length, 8) for n in (4, kv_heads, kv_heads)]
    compare(
        lambda q, k, v: attention(q, k, v, visible=visible, causal=causal),
        lambda q, k, v: attention_reference(q, k, v, visible, causal),
        inputs,
        dtype,
    )


def test_blocked_attention_is_exact_in_fp64():
    """The blocks serve bf16 only; in fp64 their arithmetic can be compared to the last digits."""
    q, k, v = (torch.randn(2, n, 300, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    out = _BlockedAttention.apply(q, k, v, None, True)
    expected = attention_reference(q, k, v, None, True)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    direction = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), direction)
    want = torch.autograd.grad(expected, (q, k, v), direction)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # sums over query blocks are kept in fp32
