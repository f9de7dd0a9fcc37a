"""Keys of retention that must agree, and one that has no effect without evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


@rule("checkpoint.keep_every", "checkpoint.save_interval")
def _kept_steps_are_saved(config: StackWiseConfig) -> list[Problem]:
    every, interval = config.checkpoint.keep_every, config.checkpoint.save_interval
    if every is None or every % interval == 0:
        return []
    nearest = max(1, round(every / interval)) * interval
    message = (
        f"is no multiple of checkpoint.save_interval ({interval}), so most of these steps are never saved"
    )
    return [Problem("checkpoint.keep_every", message, every, f"a multiple of it, such as {nearest}")]


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    (
        "checkpoint.keep_best",
        lambda c: c.evaluation.interval is None,
        "evaluation.interval is null, so nothing but stage ends is evaluated, and those are kept anyway",
    ),
]
