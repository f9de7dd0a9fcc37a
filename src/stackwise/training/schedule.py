"""Learning rate over a stage, as a factor on the peak rate."""

from __future__ import annotations

import math

from stackwise.curriculum.stage import Stage
from stackwise.training.settings import TrainingSettings


def stage_factor(stage: Stage, step: int, training: TrainingSettings) -> float:
    """Factor on the peak rate at the step-th step of a stage (0-based).

    In a schedule that stages share, each still warms up by itself.
    """
    start, total = stage.schedule or (0, stage.steps)
    factor = lr_factor(
        start + step,
        total,
        kind=training.lr_schedule,
        warmup=0 if stage.schedule else stage.warmup_steps,
        min_ratio=training.min_lr_ratio,
        decay_fraction=training.decay_fraction,
    )
    if stage.schedule and step < stage.warmup_steps:
        factor *= (step + 1) / (stage.warmup_steps + 1)
    return factor


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
