"""Random numbers by counter: what a sample draws depends on (seed, sample id, draw, stream) and nothing else.

No generator and no state, so batch size, order, worker, rank, process and device play no part. The mixing function is
that of SplitMix64 (Steele, Lea and Flood 2014), in wrapping int64 arithmetic, which every device computes alike.
Shape letters: B batch, n numbers per sample.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 (√5 - 1)/2: multiples of it, modulo 2^64, are the most even sequence there is."""


def scores(seed: int, sample_ids: Tensor, draws: Tensor, n: int, stream: str) -> Tensor:
    """n numbers for each sample: sample_ids [B], draws [B], both integer -> int64 [B, n] in [0, 2^62).

    `stream` names the use; two uses of one sample share no numbers. The first m of n numbers are those of n = m.
    """
    return _shifted(_raw(seed, sample_ids, draws, n, stream), 2)


def uniforms(seed: int, sample_ids: Tensor, draws: Tensor, n: int, stream: str) -> Tensor:
    """As `scores`, as float64 [B, n] in [0, 1): multiples of 2^-53."""
    return _shifted(_raw(seed, sample_ids, draws, n, stream), 11).double() * 2.0**-53


def normals(seed: int, sample_ids: Tensor, draws: Tensor, n: int, stream: str) -> Tensor:
    """As `scores`, as float64 [B, n] of mean 0 and variance 1: the inverse normal distribution of uniform numbers."""
    return torch.special.ndtri(centred(_raw(seed, sample_ids, draws, n, stream)))


def mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64: a bijection of int64, here read as 64 bits."""
    x = (x ^ _shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def centred(bits: Tensor) -> Tensor:
    """64 bits as float64 in the open (0, 1): the middle of one of 2^52 equal cells, so that 1 - u is another."""
    return (_shifted(bits, 12).double() + 0.5) * 2.0**-52


def keys(seed: int, stream: str, *parts: Tensor) -> Tensor:
    """int64 [B]: one key for (seed, stream) and the integers [B] of `parts`, in this order."""
    key = torch.full_like(parts[0], signed(_start(seed, stream)), dtype=torch.int64)
    for part in parts:
        key = mix(key + part.long())
    return key


def signed(bits: int) -> int:
    """Any integer, modulo 2^64, as the int64 of the same bits."""
    bits &= (1 << 64) - 1
    return bits - (1 << 64) if bits >> 63 else bits


def _raw(seed: int, sample_ids: Tensor, draws: Tensor, n: int, stream: str) -> Tensor:
    if sample_ids.ndim != 1 or sample_ids.shape != draws.shape:
        shapes = f"{list(sample_ids.shape)} and {list(draws.shape)}"
        raise ValueError(f"sample_ids and draws are {shapes}, but both must be [B]")
    counter = torch.arange(1, n + 1, device=sample_ids.device) * signed(GOLDEN)
    return mix(keys(seed, stream, sample_ids, draws)[:, None] + counter)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Shift to the right with zeros; torch's own shift repeats the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


@lru_cache(maxsize=256)
def _start(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
