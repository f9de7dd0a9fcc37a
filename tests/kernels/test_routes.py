"""Gradients to the last digits, and the routes that only some processors take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from stackwise.kernels import product as products
from stackwise.kernels.attention import _BlockedAttention
from stackwise.kernels.linear import _Linear, linear, linear_reference
from stackwise.kernels.linear_cross_entropy import (
    CHUNK_BYTES,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from stackwise.kernels.product import product
from stackwise.kernels.rms_norm import rms_norm
from stackwise.kernels.rotary import rotary_table, rotate
from stackwise.kernels.short_conv import short_conv

LABELS = torch.tensor([3, -100, 0, 6, 2])


def wide(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("fused", "shapes"),
    [
        (lambda x, w: rms_norm(x, w, 1e-5), [(2, 3, 5), (5,)]),
        (lambda x, w: rms_norm(x.transpose(0, 1), w, 1e-5), [(2, 3, 5), (5,)]),
        (short_conv, [(2, 5, 3), (3, 3)]),
        (lambda x, w, b: _Linear.apply(x, w, b, torch.float64), [(2, 3, 5), (4, 5), (4,)]),
        (lambda h, w: linear_cross_entropy(h, w, LABELS), [(5, 4), (7, 4)]),
        (lambda h, w: linear_cross_entropy(h, w, LABELS, rows_per_chunk=2), [(5, 4), (7, 4)]),
        (lambda q, k, v: _BlockedAttention.apply(q, k, v, None, True), [(1, 4, 5, 2), (1, 2, 5, 2), (1, 2, 5, 2)]),
        (lambda x: rotate(x, rotary_table((1.0, 0.1), 1.0, 8, torch.device("cpu"), True)[2:5]), [(2, 3, 2, 4)]),
    ],
    ids=["norm", "norm-strided", "conv", "linear", "loss", "loss-chunked", "attention", "rotation"],
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(
    fused: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    assert torch.autograd.gradcheck(fused, [wide(*shape) for shape in shapes])


def test_blocks_of_queries_add_up_as_one_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [wide(2, 4, 7, 2), wide(2, 2, 7, 2), wide(2, 2, 7, 2)]
    seen = torch.rand(2, 1, 7, 7) < 0.6
    seen |= torch.eye(7, dtype=torch.bool)
    seen &= torch.ones(7, 7, dtype=torch.bool).tril()
    for visible in (None, seen, seen[:1]):
        whole = _BlockedAttention.apply(*inputs, visible, True)
        wanted = torch.autograd.grad(whole.sum(), inputs)
        with monkeypatch.context() as patch:
            patch.setattr("stackwise.kernels.attention.QUERIES", 3)
            patch.setattr("stackwise.kernels.attention.BLOCK_NUMBERS", 1)  # one row of the batch at a time
            cut = _BlockedAttention.apply(*inputs, visible, True)
            got = torch.autograd.grad(cut.sum(), inputs)
        for a, b in zip((cut, *got), (whole, *wanted), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_sums_over_many_blocks_do_not_stagnate_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query looks at all keys equally, so the first value's gradient is 1 + 1/2 + ... + 1/400."""
    monkeypatch.setattr("stackwise.kernels.attention.QUERIES", 1)
    q, k, v = (torch.zeros(1, 1, 400, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    _BlockedAttention.apply(q, k, v, None, True)[..., 0].sum().backward()
    assert v.grad is not None
    assert v.grad[0, 0, 0, 0].item() == pytest.approx(sum(1 / n for n in range(1, 401)), rel=0.01)


@pytest.fixture
def everything_through_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Send every fp32 product to oneDNN, whatever the processor and the size; gives the shapes it multiplied."""
    try:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        multiply(torch.ones(2, 3), torch.ones(4, 3), None, "none", [], "")
    except (AttributeError, RuntimeError):
        pytest.skip("this PyTorch has no oneDNN product")
    seen: list[tuple[int, ...]] = []

    def counted(a: Tensor, b: Tensor, *rest: object) -> Tensor:
        seen.append((*a.shape, b.shape[0]))
        return multiply(a, b, *rest)

    monkeypatch.setattr(products, "_worth_it", 0)
    monkeypatch.setattr(products, "_onednn", lambda: counted)
    return seen


def close_to_fp64(
    fused: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    own = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    out, expected = fused(*own), reference(*exact)
    direction = torch.randn_like(expected)
    got = torch.autograd.grad(out, own, direction.float())
    want = torch.autograd.grad(expected, exact, direction)
    for a, b in zip((out, *got), (expected, *want), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (5, 7, 3), (33, 16, 40), (3, 64, 65)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_through_onednn(
    everything_through_onednn: list[tuple[int, ...]], rows: int, inner: int, columns: int, bias: bool
) -> None:
    inputs = [torch.randn(2, rows, inner), torch.randn(columns, inner)] + [torch.randn(columns)] * bias
    close_to_fp64(linear, linear_reference, inputs)
    assert len(everything_through_onednn) == 3  # forward, gradient to the input, gradient to the weight
    strided = [torch.randn(inner, rows, 2).transpose(0, 2), *inputs[1:]]
    close_to_fp64(linear, linear_reference, strided)


@pytest.mark.parametrize("rows_per_chunk", [None, 4])
def test_loss_through_onednn(
    everything_through_onednn: list[tuple[int, ...]], rows_per_chunk: int | None
) -> None:
    labels = torch.randint(0, 37, (11,))
    labels[3] = -100
    close_to_fp64(
        lambda h, w: linear_cross_entropy(h, w, labels, rows_per_chunk=rows_per_chunk),
        lambda h, w: linear_cross_entropy_reference(h, w, labels),
        [torch.randn(11, 12), torch.randn(37, 12)],
    )
    assert len(everything_through_onednn) == (3 if rows_per_chunk is None else 9)


def test_only_amd_processors_with_avx512_leave_pytorch_s_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (
        {"cpu_name": "Intel Xeon", "avx512_f": True},
        {"cpu_name": "AMD Ryzen 5", "avx512_f": False},
        {"cpu_name": "Apple M4"},
        {},
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert products._onednn.__wrapped__() is None
    monkeypatch.setattr(products, "_onednn", lambda: None)
    a, b, bias = torch.randn(300, 64), torch.randn(96, 64), torch.randn(96)
    assert torch.equal(product(a, b, bias), torch.addmm(bias, a, b.t()))


def test_loss_of_confident_and_hopeless_rows_stays_exact() -> None:
    """Where the label's probability underflows, its loss does not."""
    hidden = torch.tensor([[200.0], [-200.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    labels = torch.tensor([0, 0, 2])
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, torch.tensor(400.0 + torch.log(torch.tensor(3.0)).item()))
    loss.backward()
    assert hidden.grad is not None
    plain = linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(plain, hidden)[0])


def test_loss_in_bf16_is_that_of_its_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding enters through the product alone: softmax and sum are fp32, over more rows than are widened at once."""
    monkeypatch.setattr("stackwise.kernels.linear_cross_entropy.WIDENED", 50 * 8)
    hidden = torch.randn(21, 24).bfloat16()
    weight = torch.randn(50, 24)
    labels = torch.randint(0, 50, (len(hidden),))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    logits = torch.mm(hidden, weight.bfloat16().t()).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_chunks_of_logits_fit_their_budget_and_never_get_too_thin() -> None:
    assert chunk_rows(32_000) * 32_000 * 4 <= CHUNK_BYTES["cpu"]
    assert chunk_rows(32_000, torch.bfloat16) // 2 == chunk_rows(32_000)
    assert chunk_rows(10**7) == 128
    assert chunk_rows(32_000, device="cuda") > chunk_rows(32_000)
