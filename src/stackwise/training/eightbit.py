"""Numbers in eight bits: one scale per block of 256, and 256 values between -1 and 1 that are dense near zero.

Block-wise dynamic quantisation of Dettmers et al. 2021 (arXiv 2110.02861). A number is divided by the largest
magnitude of its block and stored as the index of the nearest value of the dynamic map: seven decades, the top one with
64 values of each sign, each further one with half as many. Where no sign is needed, every decade has twice as many.
Codes and scales are laid out as bitsandbytes lays out its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7
_SHIFT = 12  # bits of an fp32 number that a cell of the search table leaves out


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values in ascending order, 0 and 1 among them; between 0 and 1 when not `signed`."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        middles = 10.0 ** (decade - DECADES + 1) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values))


class _Tables(NamedTuple):
    values: Tensor  # fp32 [256]
    nearest: Tensor  # uint8 [2^20]: code of the value nearest to a number with these leading bits


@lru_cache(maxsize=8)
def _tables(signed: bool, device: torch.device) -> _Tables:
    """A search among 256 values takes eight comparisons a number; reading the code at its leading bits takes one step.

    A cell of the table is 2^-11 of its numbers wide, so next to the middle between two values either may be taken.
    Without signs only 0 becomes 0: the second moment is a divisor, and a small one must not vanish.
    """
    values = dynamic_map(signed)
    bits = torch.arange(1 << (32 - _SHIFT), dtype=torch.int64) << _SHIFT
    middles = bits.add_(1 << (_SHIFT - 1)).to(torch.int32).view(torch.float32)
    nearest = torch.bucketize(middles, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    if not signed:
        nearest[1 : len(nearest) // 2].clamp_(min=1)
    return _Tables(values.to(device), nearest.to(device))


def scale_count(numbers: int) -> int:
    """Blocks, and so scales, of that many numbers; the last block may be short."""
    return -(-numbers // BLOCK)


def _blocks(x_N: Tensor, scales_S: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of x as [blocks, width] with their scales [blocks, 1]: the whole blocks, then the short one."""
    whole = len(x_N) // BLOCK
    if whole:
        yield x_N[: whole * BLOCK].view(whole, BLOCK), scales_S[:whole, None]
    if len(x_N) % BLOCK:
        yield x_N[whole * BLOCK :].view(1, -1), scales_S[whole:, None]


def quantise(x_N: Tensor, codes_N: Tensor, scales_S: Tensor, *, signed: bool) -> None:
    """Write x, fp32, into `codes` (uint8) and `scales` (fp32, one per block). Overwrites x."""
    nearest = _tables(signed, x_N.device).nearest
    for part, scale in _blocks(x_N, scales_S):
        torch.amax(part.abs(), dim=1, keepdim=True, out=scale)
        part.div_(scale.clamp_min(torch.finfo(torch.float32).tiny))
    leading = x_N.view(torch.int32).bitwise_right_shift_(_SHIFT).bitwise_and_(len(nearest) - 1)
    torch.index_select(nearest, 0, leading, out=codes_N)


def dequantise(codes_N: Tensor, scales_S: Tensor, *, signed: bool) -> Tensor:
    """The numbers as fp32 [N]."""
    x_N = _tables(signed, codes_N.device).values.index_select(0, codes_N.to(torch.int32))
    for part, scale in _blocks(x_N, scales_S):
        part.mul_(scale)
    return x_N
