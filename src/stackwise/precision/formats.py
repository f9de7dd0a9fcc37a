"""Frozen weight formats: how the matrices of a stack that no longer trains are stored.

| format | stored | bits per weight |
|---|---|---|
| fp32, fp16, bf16 | the numbers themselves | 32, 16, 16 |
| fp8 | E4M3 codes, one fp32 scale per output channel | 8 |
| nvfp4 | E2M1 codes in blocks of 16, an E4M3 scale per block, one fp32 scale | 4.5 |
| nf4 | NormalFloat codes in blocks of 64, the blocks' scales in 8 bits | 4.127 |

A format turns a matrix into named tensors and back. Quantising is written in plain PyTorch alone, so that a matrix has
the same bytes wherever it is frozen; turning codes into numbers takes a faster route where there is one, with the same
result to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stackwise.config.errors import did_you_mean
from stackwise.precision.base import Format
from stackwise.precision.four_bit import NF4, NVFP4
from stackwise.precision.wide import FP8, Plain

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Plain("fp32", torch.float32),
        Plain("fp16", torch.float16),
        Plain("bf16", torch.bfloat16),
        FP8(),
        NVFP4(),
        NF4(),
    )
}
"""All formats by name."""


def format_of(name: str) -> Format:
    """The format called `name`; another name is a ValueError with the known ones."""
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS)
        raise ValueError(
            f"unknown weight format {name!r}; known: {', '.join(FORMATS)}" + (f"; {hint}" if hint else "")
        )
    return FORMATS[name]


def weight_bytes(shape: Sequence[int], name: str) -> int:
    """Bytes that a matrix of `shape` takes in a format, exactly."""
    return format_of(name).bytes(shape)
