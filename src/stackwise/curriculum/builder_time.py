"""What depth as time asks of a rack that grows by hand."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from stackwise.config.objective_rules import time_of
from stackwise.config.rules import stacks_at_the_end
from stackwise.curriculum.present import with_target

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

KEYS = "training.progressive"


def check_time(config: StackWiseConfig, mode: str, present: int, at_left: bool) -> None:
    """Raise ValueError where no noise is left for one more stack; warn where it takes the noise of older ones away.

    `mode` is the builder's, `present` its number of stacks. Without effect where time is not depth.
    """
    if time_of(with_target(config, mode, stacks_at_the_end(config), 0)) != "depth":
        return
    keys = config.training.progressive
    bounds = {f"{KEYS}.target_stacks": keys.target_stacks}
    if keys.num_time_steps is not None:
        bounds[f"{KEYS}.num_time_steps"] = keys.num_time_steps // keys.time_per_stack
    if keys.stack_time_mapping == "custom" and keys.time_boundaries is not None:
        bounds[f"{KEYS}.time_boundaries"] = len(keys.time_boundaries) - 1
    for key, bound in bounds.items():
        if bound is not None and present >= bound:
            raise ValueError(
                f"the rack has {present} stacks, and {key} has noise for {bound}: one more would lie past the "
                "horizon; raise it, or set training.progressive.time_interpretation to input or none"
            )
    grows_left = mode in ("prepend", "independent")
    if present and at_left != grows_left:
        verb = "prepend_stack" if at_left else "append_stack"
        warnings.warn(
            f"{verb} under building_mode {mode} moves the older stacks to other noise than they were trained on "
            "(training.progressive.time_interpretation is depth); grow at one end alone",
            UserWarning,
            stacklevel=4,
        )
