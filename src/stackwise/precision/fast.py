"""The one place that decides who turns NF4 codes into numbers.

bitsandbytes does it in native code, with the same result to the last bit: on one core of a CPU a million weights take
0.15 ms, by PyTorch 1 ms. torchao gives the same numbers as well, but takes 10 ms for NF4 and 49 ms for NVFP4 there, so
nothing is left to it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

WORTH_IT = 2**16
"""Weights from which the faster code outweighs the import of the package, which takes some seconds."""

Unpack = Callable[[Tensor, Tensor, int, tuple[int, ...], torch.dtype], Tensor]


@lru_cache(maxsize=1)
def _bitsandbytes() -> Unpack | None:
    """(codes, scales, block, shape, dtype) -> values; null, and a word about it, where the package is missing."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(
        logging.ERROR
    )  # it also speaks of packages that it could use for what is not asked of it here
    try:
        import bitsandbytes  # noqa: F401 - it registers its operators
    except (ImportError, OSError, RuntimeError) as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        warnings.warn(
            f"bitsandbytes {why}: nf4 weights are unpacked by PyTorch, several times slower; "
            'pip install "stackwise[quant]"',
            stacklevel=2,
        )
        return None
    finally:
        log.setLevel(level)

    def unpack(
        codes: Tensor, scales: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes.view(-1, 1), scales, block, "nf4", shape, dtype
        )
        return values

    return unpack


def faster_nf4(codes: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Unpack | None:
    """Who unpacks a matrix of this shape faster than PyTorch; null for PyTorch itself.

    Where a row is no whole number of blocks, bitsandbytes 0.50 takes wrong scales on CPUs with AVX-512.
    """
    fits = (
        len(shape) == 2
        and prod(shape) >= WORTH_IT
        and shape[1] % 64 == 0
        and codes.device.type in ("cpu", "cuda")
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    return _bitsandbytes() if fits else None
