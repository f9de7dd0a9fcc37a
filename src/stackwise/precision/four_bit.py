"""Formats with two codes per byte: blocks of numbers that share a scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise.precision.base import TINY, Format, Layout
from stackwise.precision.fast import faster_nf4

PIECE = 2**22
"""Weights unpacked at a time: what lies between codes and values never takes more than some 50 MB."""


class Table:
    """Constants, copied to each device once."""

    def __init__(self, values: Tensor) -> None:
        self._on = {values.device: values}
        self._first = values

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._first.to(device)
        return self._on[device]


def pair_table(values: tuple[float, ...], high_first: bool) -> Table:
    """For each byte its two fp32 values, kept as one 64-bit number so that one look-up finds both."""
    each = torch.tensor(values, dtype=torch.float32)
    upper, lower = each.repeat_interleave(16), each.repeat(16)
    pairs = torch.stack([upper, lower] if high_first else [lower, upper], dim=1)
    return Table(pairs.view(torch.int64).view(-1))


def dynamic_tree() -> Table:
    """The 256 values of the signed dynamic tree type, rising.

    For each power of ten from 1e-6 to 1 the centres of 1, 2, 4 ... 64 equal parts of [0.1, 1] times it, with both
    signs; 0; and 1.
    """
    sizes = [
        10.0 ** (exponent - 6) * (0.1 + 0.9 * (i + 0.5) / 2**exponent)
        for exponent in range(7)
        for i in range(2**exponent)
    ]
    return Table(torch.tensor(sorted([0.0, 1.0, *sizes, *(-size for size in sizes)]), dtype=torch.float32))


class Blocks(Format):
    """Sixteen values, by which the numbers of each block are approximated after division by the block's scale.

    Blocks run over the matrix row by row; the last one may be short.
    """

    block: int
    values: tuple[float, ...]
    """What each code stands for."""
    high_first: bool
    """Whether the first of two numbers takes the upper half of their byte."""

    def __init__(self) -> None:
        self.pairs = pair_table(self.values, self.high_first)

    def layout(self, shape: Sequence[int]) -> Layout:
        n = prod(shape)
        return {"codes": ((-(-n // 2),), torch.uint8), **self.scale_layout(-(-n // self.block))}

    @abstractmethod
    def scale_layout(self, n_blocks: int) -> Layout:
        """The tensors that hold the scales."""

    @abstractmethod
    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What each block's values are multiplied by, fp32 [blocks]."""

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.unpack_reference(tensors["codes"], self.scales(tensors), shape, dtype)

    def unpack_reference(
        self, codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The formula: value of the code times scale of the block, by one look-up for both numbers of a byte."""
        n, block = prod(shape), self.block
        table = self.pairs.on(codes.device)

        def piece(start: int, stop: int) -> Tensor:
            pairs = torch.take(table, codes[start // 2 : -(-stop // 2)].long()).view(torch.float32)
            own = scales[start // block : -(-stop // block)]
            if len(pairs) == len(own) * block:
                pairs = pairs.view(-1, block).mul_(own[:, None]).view(-1)
            else:
                pairs = pairs.mul_(own.repeat_interleave(block)[: len(pairs)])
            return pairs[: stop - start]

        if n <= PIECE:
            return piece(0, n).to(dtype).view(tuple(shape))
        whole = torch.empty(n, dtype=dtype, device=codes.device)
        for start in range(0, n, PIECE):
            stop = min(start + PIECE, n)
            whole[start:stop] = piece(start, stop)
        return whole.view(tuple(shape))

    def blocks_of(self, weight: Tensor) -> Tensor:
        """[blocks, block], the last one filled up with zeros."""
        flat = weight.reshape(-1)
        return F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)

    def pack_codes(self, codes: Tensor, n: int) -> Tensor:
        """The codes of the first n numbers, two per byte."""
        first, second = codes.reshape(-1)[: n + n % 2].view(-1, 2).unbind(1)
        return (first << 4 | second) if self.high_first else (second << 4 | first)


class NVFP4(Blocks):
    """E2M1 codes, an E4M3 scale per 16 numbers, one fp32 scale (NVIDIA 2025, arXiv 2509.25149, appendix B).

    s = max |w| / (6 * 448);  s_b = e4m3(max_b |w| / 6 / s);  code = e2m1(w / (s_b s));  w' = code s_b s

    Ties go to the even code. The first of two numbers takes the lower half of their byte, as in
    `torch.float4_e2m1fn_x2`.
    """

    name, bits, block, high_first = "nvfp4", 4 + 8 / 16, 16, False
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    values = (*magnitudes, *(-m for m in magnitudes))

    def scale_layout(self, n_blocks: int) -> Layout:
        return {"scale": ((n_blocks,), torch.float8_e4m3fn), "tensor_scale": ((), torch.float32)}

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["scale"].to(torch.float32) * tensors["tensor_scale"]

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = self.blocks_of(weight)
        largest = blocks.abs().amax(1)
        tensor_scale = (largest.amax() / (6 * 448)).clamp_min(TINY)
        scale = (largest / 6 / tensor_scale).to(torch.float8_e4m3fn)
        total = self.scales({"scale": scale, "tensor_scale": tensor_scale})
        # A block so small beside the others that its scale rounds to zero becomes zero, whatever its codes.
        scaled = blocks / total[:, None]
        codes = _count_above(scaled.abs(), _nvfp4_bounds()).add_(scaled < 0, alpha=8)
        return {"codes": self.pack_codes(codes, weight.numel()), "scale": scale, "tensor_scale": tensor_scale}


def _nvfp4_bounds() -> list[float]:
    """Largest number that still rounds to each magnitude. A tie goes to the even code: below every other bound."""
    sizes = torch.tensor(NVFP4.magnitudes)
    middle = (sizes[:-1] + sizes[1:]) / 2
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros(()))
    bounds: list[float] = middle.tolist()
    return bounds


def _count_above(x: Tensor, bounds: list[float]) -> Tensor:
    """For each number, how many of the bounds it is above; uint8. A dozen comparisons are faster than a search."""
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for bound in bounds:
        count += x > bound
    return count


class NF4(Blocks):
    """4-bit NormalFloat with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E).

    scale = max_b |w|;  code = nearest of the sixteen quantiles of a normal distribution to w / scale

    The scales, less their mean, are stored in 8 bits: the nearest value of the dynamic tree type (Dettmers 2015, arXiv
    1511.04561) to scale / (the largest of 256 scales). Codes and layout are those of bitsandbytes.
    """

    name, bits, block, high_first = "nf4", 4 + 8 / 64 + 32 / (64 * 256), 64, True
    values = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
    group = 256
    """Scales that share a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = dynamic_tree()

    def scale_layout(self, n_blocks: int) -> Layout:
        return {
            "scale": ((n_blocks,), torch.uint8),
            "group_scale": ((-(-n_blocks // self.group),), torch.float32),
            "mean_scale": ((), torch.float32),
        }

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors["scale"]
        groups = tensors["group_scale"].repeat_interleave(self.group)[: len(codes)]
        return torch.take(self.tree.on(codes.device), codes.long()).mul_(groups).add_(tensors["mean_scale"])

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scales = tensors["codes"], self.scales(tensors)
        faster = faster_nf4(codes, shape, dtype)
        if faster is not None:
            return faster(codes, scales, self.block, tuple(shape), dtype)
        return self.unpack_reference(codes, scales, shape, dtype)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = self.blocks_of(weight)
        scales = blocks.abs().amax(1)
        scaled = blocks * (1.0 / scales.clamp_min(1e-38))[:, None]
        codes = _count_above(scaled, _middles(torch.tensor(self.values)).tolist())
        # in fp64, so that the mean does not depend on the order of summation; not every device has it
        mean = scales.cpu().double().mean().float().to(weight.device)
        centred = F.pad(scales - mean, (0, -len(scales) % self.group)).view(-1, self.group)
        group_scale = centred.abs().amax(1)
        share = (centred * (1.0 / group_scale.clamp_min(1e-38))[:, None]).view(-1)[: len(scales)]
        return {
            "codes": self.pack_codes(codes, weight.numel()),
            "scale": torch.bucketize(share, _middles(self.tree.on(weight.device))).to(torch.uint8),
            "group_scale": group_scale,
            "mean_scale": mean,
        }


def _middles(values: Tensor) -> Tensor:
    """The bounds between which numbers are nearest to each of the rising values."""
    return (values[:-1] + values[1:]) / 2
