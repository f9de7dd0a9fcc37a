"""Gaussian corruption of embeddings: e' = √α e + √(1 - α) ε at chosen positions, with ε from counter-based bits.

Shape letters: B batch, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stackwise.objectives import bits


def gaussian_noise(shape: Sequence[int], seed: int, sample_ids: Tensor, draws: Tensor) -> Tensor:
    """ε, float32 of `shape` (B, T, D), of mean 0 and variance 1: a function of (seed, sample id, draw) and the place.

    sample_ids and draws are integer [B]. The noise of a position is the same in a longer row.
    """
    rows, length, width = shape
    return bits.normals(seed, sample_ids, draws, length * width, "gaussian").float().view(rows, length, width)


def corrupt_embeddings(
    embeddings: Tensor, masks: Tensor, rates: Tensor, seed: int, sample_ids: Tensor, draws: Tensor
) -> Tensor:
    """Embeddings [B, T, D] with noise at `masks` [B, T]; elsewhere, and at rate 0, they are exactly as before.

    rates [B] are 1 - α, in [0, 1]. Gradient reaches the embeddings, scaled by √α.
    """
    noise = gaussian_noise(embeddings.shape, seed, sample_ids, draws).to(embeddings)
    share = rates.double()[:, None, None]
    mixed = (1 - share).sqrt().to(embeddings) * embeddings + share.sqrt().to(embeddings) * noise
    return mixed.where(masks[:, :, None], embeddings)
