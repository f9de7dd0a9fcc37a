"""Learning rate over a stage, as a factor on the peak rate."""

from __future__ import annotations

import math


def lr_factor(
    step: int,
    total: int,
    *,
    kind: str = "cosine",
    warmup: int = 0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
) -> float:
    """Factor for the step-th of `total` steps (0-based).

    Warm-up rises linearly and reaches 1 at step `warmup`. Then cosine or linear falls to `min_ratio` at the last
    step; wsd (warm-up, stable, decay) stays at 1 and falls linearly over the last `decay_fraction` of the steps;
    constant stays.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        start = max(warmup, total - max(1, round(decay_fraction * total)))
    else:
        start = warmup
    if step < start:
        return 1.0
    progress = min(1.0, (step - start + 1) / max(1, total - start))
    if kind == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 + (min_ratio - 1.0) * progress
