"""Formats with one code per number: fp32, fp16, bf16 and fp8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stackwise.precision.base import TINY, Format, Layout


class Plain(Format):
    """The numbers themselves, in a dtype."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype, self.bits = name, dtype, dtype.itemsize * 8

    def layout(self, shape: Sequence[int]) -> Layout:
        return {"codes": (tuple(shape), self.dtype)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        codes = weight.to(self.dtype, copy=True)
        if self.dtype == torch.float16 and not torch.isfinite(codes).all():
            raise ValueError(
                f"{self.name} ends at 65504 and the matrix reaches {float(weight.abs().max()):.4g}; "
                "store it as bf16, fp8 or fp32"
            )
        return {"codes": codes}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes = tensors["codes"]
        if codes.dtype != dtype:
            codes = codes.to(torch.float32)  # a CPU turns fp16 into bf16 directly at a fifth of the speed
        return codes.to(dtype)


class FP8(Format):
    """E4M3 (Micikevicius et al. 2022, arXiv 2209.05433), one scale per output channel.

    scale_o = max_i |w_oi| / 448;  code_oi = e4m3(w_oi / scale_o)
    """

    name, bits = "fp8", 8.0
    LARGEST = 448.0

    def layout(self, shape: Sequence[int]) -> Layout:
        return {"codes": (tuple(shape), torch.float8_e4m3fn), "scale": ((shape[0],), torch.float32)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        rows = weight.reshape(weight.shape[0], -1)
        scale = (rows.abs().amax(1) / self.LARGEST).clamp_min_(TINY)
        codes = (rows / scale[:, None]).to(torch.float8_e4m3fn)
        return {"codes": codes.view(weight.shape), "scale": scale}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scale = tensors["codes"], tensors["scale"]
        if codes.device.type != "cpu":
            return self.unpack_reference(tensors, shape, dtype)
        # The CPU converts E4M3 number by number. Shifted into place, its bits are those of fp16 numbers 256 times
        # smaller, which the CPU widens sixteen at a time: over ten times as fast.
        bits = codes.view(torch.int8).to(torch.int16)
        small = bits.bitwise_left_shift_(7).bitwise_and_(0xBFFF - 0x10000).view(torch.float16)
        values = small.to(torch.float32).view(shape[0], -1)
        return values.mul_((scale * 256)[:, None]).to(dtype).view(tuple(shape))

    def unpack_reference(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The formula."""
        values = tensors["codes"].to(torch.float32).view(shape[0], -1)
        return values.mul_(tensors["scale"][:, None]).to(dtype).view(tuple(shape))
