"""Every frozen format against a slow reading of its definition, bit by bit and number by number."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stackwise.precision import fast
from stackwise.precision.formats import FORMATS, format_of, weight_bytes

LOSSY = ["fp16", "bf16", "fp8", "nvfp4", "nf4"]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))
SEEDS = st.integers(0, 2**31)
ERROR = {"fp32": 0, "fp16": 1e-3, "bf16": 5e-3, "fp8": 0.04, "nvfp4": 0.15, "nf4": 0.15}


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal weights whose rows differ in size, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) ** 3
    return weight * (torch.rand(shape, generator=generator) > 0.1)


def float_value(bits: int, exponent_bits: int, mantissa_bits: int) -> float:
    """What the bits of a small IEEE-like float stand for; no infinities."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = bits & (2**mantissa_bits - 1)
    exponent = (bits >> mantissa_bits) & (2**exponent_bits - 1)
    sign = -1.0 if bits >> (mantissa_bits + exponent_bits) else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


E4M3 = [float_value(bits, 4, 3) for bits in range(256)]
E2M1 = [float_value(bits, 2, 1) for bits in range(16)]
FINITE_E4M3 = [value for bits, value in enumerate(E4M3) if bits & 0x7F != 0x7F]


def nibbles(codes: Tensor, n: int, high_first: bool) -> list[int]:
    pairs = [(byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4) for byte in codes.tolist()]
    return [code for pair in pairs for code in pair][:n]


def distance(x: float, values: list[float]) -> float:
    return min(abs(x - value) for value in values)


@given(SHAPES, SEEDS)
@settings(deadline=None, max_examples=25)
def test_fp8_codes_are_the_nearest_numbers_of_e4m3(shape: tuple[int, int], seed: int) -> None:
    weight = numbers(shape, seed)
    packed = format_of("fp8").quantise(weight)
    back = format_of("fp8").dequantise(packed, shape, torch.float32)
    for row, codes, scale, values in zip(
        weight.double().tolist(),
        packed["codes"].view(torch.uint8).tolist(),
        packed["scale"].double().tolist(),
        back.double().tolist(),
        strict=True,
    ):
        largest = max(abs(x) for x in row)
        if largest:
            assert scale == pytest.approx(largest / 448, rel=1e-6)
        for x, code, value in zip(row, codes, values, strict=True):
            assert value == pytest.approx(E4M3[code] * scale, rel=1e-6)
            assert abs(x / scale - E4M3[code]) <= distance(x / scale, FINITE_E4M3) + 1e-4


@given(SHAPES, SEEDS)
@settings(deadline=None, max_examples=25)
def test_nvfp4_codes_are_the_nearest_numbers_of_e2m1(shape: tuple[int, int], seed: int) -> None:
    weight = numbers(shape, seed)
    packed = format_of("nvfp4").quantise(weight)
    back = format_of("nvfp4").dequantise(packed, shape, torch.float32).reshape(-1).tolist()
    flat = weight.double().reshape(-1).tolist()
    codes = nibbles(packed["codes"], len(flat), high_first=False)
    scales = [E4M3[bits] for bits in packed["scale"].view(torch.uint8).tolist()]
    whole = float(packed["tensor_scale"])
    if any(flat):
        assert whole == pytest.approx(max(map(abs, flat)) / (6 * 448), rel=1e-6)
    for i in range(0, len(flat), 16):
        block, scale = flat[i : i + 16], scales[i // 16]
        wanted = max(map(abs, block)) / 6 / whole
        assert abs(scale - wanted) <= distance(wanted, FINITE_E4M3) + 1e-4
        for x, code, value in zip(block, codes[i : i + 16], back[i : i + 16], strict=True):
            assert value == pytest.approx(E2M1[code] * scale * whole, rel=1e-6)
            if scale:
                x /= scale * whole
                assert abs(x - E2M1[code]) <= distance(x, E2M1) + 1e-4


@given(SHAPES, SEEDS)
@settings(deadline=None, max_examples=25)
def test_nf4_codes_are_the_nearest_quantiles(shape: tuple[int, int], seed: int) -> None:
    weight = numbers(shape, seed)
    packed = format_of("nf4").quantise(weight)
    flat = weight.double().reshape(-1).tolist()
    codes = nibbles(packed["codes"], len(flat), high_first=True)
    values = list(format_of("nf4").values)  # type: ignore[attr-defined]
    back = format_of("nf4").dequantise(packed, shape, torch.float32).double().reshape(-1).tolist()
    for i in range(0, len(flat), 64):
        block = flat[i : i + 64]
        largest = max(map(abs, block))
        scale = dynamic_value(packed, i // 64)
        widest, mean = float(packed["group_scale"][i // 64 // 256]), float(packed["mean_scale"])
        # the tree's widest gap is 0.9 / 64, in the top power of ten
        assert abs(scale - largest) <= 0.0071 * widest + 1e-6 * largest
        for x, code, value in zip(block, codes[i : i + 64], back[i : i + 64], strict=True):
            assert value == pytest.approx(
                values[code] * scale, rel=1e-5, abs=1e-6 * widest + 1e-6 * abs(mean)
            )
            if largest:
                assert abs(x / largest - values[code]) <= distance(x / largest, values) + 1e-6


def dynamic_value(packed: dict[str, Tensor], block: int) -> float:
    """The scale of a block: the value of its 8-bit code by the definition of the tree, times and plus the scales'.

    A tree of 8 bits: a sign; e zeros, a one; the other 6 - e bits count equal parts of [0.1, 1]; times 10^-e.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        parts = 2 ** (6 - zeros)
        centres = [(0.1 + 0.9 * (i + 0.5) / parts) * 10.0**-zeros for i in range(parts)]
        values += centres + [-value for value in centres]
    code = int(packed["scale"][block])
    return sorted(values)[code] * float(packed["group_scale"][block // 256]) + float(packed["mean_scale"])


def test_the_values_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    # QLoRA, equation 4, with the offset 0.9677083 of its code: the means of neighbouring quantiles of the two halves
    def quantile(p: float) -> float:
        return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))

    offset = 0.9677083
    upper = [quantile(float(p)) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]]
    lower = [-quantile(float(p)) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1]]
    wanted = sorted(x / max(upper) for x in [*upper, 0.0, *lower])
    assert list(format_of("nf4").values) == pytest.approx(wanted, abs=1e-5)  # type: ignore[attr-defined]


@given(SHAPES, SEEDS, st.sampled_from(LOSSY))
@settings(deadline=None, max_examples=60)
def test_storing_the_rounded_weight_again_changes_nothing_of_16_and_8_bits(
    shape: tuple[int, int], seed: int, name: str
) -> None:
    weight = numbers(shape, seed)
    once = format_of(name).round(weight)
    if name in ("nf4", "nvfp4"):  # their scales are rounded as well, and rounding those twice may move them
        assert (format_of(name).round(once) - once).norm() <= 0.1 * once.norm() + 1e-30
    else:
        torch.testing.assert_close(format_of(name).round(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (1, 1), (128, 160), (7, 333)])
def test_the_layout_is_what_is_stored_and_its_bytes_are_counted_exactly(
    name: str, shape: tuple[int, int]
) -> None:
    chosen = format_of(name)
    packed = chosen.quantise(torch.randn(shape))
    assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == chosen.layout(shape)
    assert sum(t.untyped_storage().nbytes() for t in packed.values()) == weight_bytes(shape, name)
    assert chosen.dequantise(packed, shape, torch.float32).shape == shape


@pytest.mark.parametrize(
    ("name", "bytes_per_weight"),
    [("fp32", 4), ("fp16", 2), ("bf16", 2), ("fp8", 1 + 4 / 1024), ("nvfp4", 0.5625), ("nf4", 4.127 / 8)],
)
def test_bytes_per_weight(name: str, bytes_per_weight: float) -> None:
    assert weight_bytes((1024, 1024), name) / 2**20 == pytest.approx(bytes_per_weight, rel=1e-4)
    assert weight_bytes((8192, 8192), name) * 8 / 2**26 == pytest.approx(format_of(name).bits, rel=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_of_normal_weights(name: str) -> None:
    weight = torch.randn(128, 256) * 0.02
    error = (format_of(name).round(weight) - weight).norm() / weight.norm()
    assert error <= ERROR[name]
    assert error > 0 or name == "fp32"


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_weights_stay_finite_and_zeros_stay_zero(name: str) -> None:
    assert torch.equal(format_of(name).round(torch.zeros(20, 7)), torch.zeros(20, 7))
    largest = 6e4 if name == "fp16" else 1e38
    for weight in (torch.randn(5, 40) * 1e-42, torch.randn(5, 40).clamp(-1, 1) * largest):
        assert torch.isfinite(format_of(name).round(weight)).all()
    mixed = torch.randn(4, 64)
    mixed[2] *= 1e-20
    mixed[3] = 0
    back = format_of(name).round(mixed)
    assert torch.isfinite(back).all()
    assert torch.equal(back[3], mixed[3])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    weight = torch.randn(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=f"stored as {name} holds numbers that are not finite"):
        format_of(name).quantise(weight)


def test_what_fp16_cannot_hold_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"fp16 ends at 65504 and the matrix reaches 7e.04; store it as bf16"
    ):
        format_of("fp16").quantise(torch.full((2, 2), 7e4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_formed_in_fp32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(12, 70)
    packed = format_of(name).quantise(weight)
    exact = format_of(name).dequantise(packed, weight.shape, torch.float32)
    got = format_of(name).dequantise(packed, weight.shape, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))


def test_the_fast_route_of_fp8_is_the_formula_to_the_last_bit() -> None:
    chosen = FORMATS["fp8"]
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(3, 1).view(torch.float8_e4m3fn)
    packed = {"codes": codes, "scale": torch.tensor([1.0, 3e-3, 7e33])}
    for dtype in (torch.float32, torch.bfloat16):
        reference = chosen.unpack_reference(packed, codes.shape, dtype)  # type: ignore[attr-defined]
        assert torch.equal(chosen.dequantise(packed, codes.shape, dtype), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 256), (1100, 64), (3, 192 * 130), (257, 320), (700, 96), (5, 20000)])
def test_bitsandbytes_gives_the_same_numbers_to_the_last_bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    chosen, weight = FORMATS["nf4"], torch.randn(shape) * torch.rand(shape[0], 1)
    packed = chosen.quantise(weight)
    # rows of half a block get wrong scales from it on some processors, so they do not go there
    assert (fast.faster_nf4(packed["codes"], shape, dtype) is None) == (shape[1] % 64 != 0)
    reference = chosen.unpack_reference(packed["codes"], chosen.scales(packed), shape, dtype)  # type: ignore[attr-defined]
    assert torch.equal(chosen.dequantise(packed, shape, dtype), reference)


def test_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(300, 512) * torch.rand(300, 1)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    own = FORMATS["nf4"].quantise(weight)
    assert torch.equal(own["codes"], codes.view(-1))
    # Its search for the nearest scale errs by a step now and then; elsewhere the scales agree but for rounding.
    same = own["scale"] == state.absmax
    assert same.float().mean() > 0.99
    theirs = functional.dequantize_4bit(codes, state).view(-1, 64)[same]
    back = FORMATS["nf4"].dequantise(own, weight.shape, torch.float32).view(-1, 64)[same]
    torch.testing.assert_close(back, theirs, rtol=1e-5, atol=1e-6)


def test_nvfp4_is_that_of_torchao_to_the_last_bit() -> None:
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = torch.randn(64, 256) * (0.2 + torch.rand(64, 1))
    scale = torchao.per_tensor_amax_to_scale(weight.abs().max())
    theirs = torchao.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
    own = FORMATS["nvfp4"].quantise(weight)
    assert torch.equal(own["codes"], theirs.qdata.view(torch.uint8).view(-1))
    assert torch.equal(own["scale"].float(), theirs.scale.view(-1).float())
    back = FORMATS["nvfp4"].dequantise(own, weight.shape, torch.float32)
    assert torch.equal(back, theirs.dequantize(torch.float32))


def test_large_matrices_are_unpacked_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, 321)
    for name in ("nf4", "nvfp4"):
        packed = format_of(name).quantise(weight)
        whole = format_of(name).dequantise(packed, weight.shape, torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr("stackwise.precision.four_bit.PIECE", 256)
            assert torch.equal(format_of(name).dequantise(packed, weight.shape, torch.bfloat16), whole)


def test_without_bitsandbytes_pytorch_unpacks_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(256, 256)
    packed = FORMATS["nf4"].quantise(weight)
    expected = FORMATS["nf4"].dequantise(packed, weight.shape, torch.float32)
    fast._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            values = [FORMATS["nf4"].dequantise(packed, weight.shape, torch.float32) for _ in range(3)]
    finally:
        fast._bitsandbytes.cache_clear()
    assert all(torch.equal(value, expected) for value in values)
    (warning,) = said
    assert "bitsandbytes is not installed" in str(warning.message)
    assert 'pip install "stackwise[quant]"' in str(warning.message)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_without_values_gives_tensors_without_values(name: str) -> None:
    shape = (130, 70)
    packed = format_of(name).quantise(torch.empty(shape, device="meta"))
    assert {n: (tuple(t.shape), t.dtype) for n, t in packed.items()} == format_of(name).layout(shape)
    assert all(t.is_meta for t in packed.values())
    values = format_of(name).dequantise(packed, shape, torch.bfloat16)
    assert (values.is_meta, values.shape, values.dtype) == (True, shape, torch.bfloat16)


def test_an_unknown_format_is_an_error_with_the_list_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown weight format 'nvf4'; known: fp32, fp16, .*did you mean 'nvfp4'"
    ):
        format_of("nvf4")
