"""Rules about where blocks live, and its keys that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.precision_rules import freezes_stacks, precisions
from stackwise.config.rules import rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

TRUNK = "training.progressive.trunk_residency"


def freezes_blocks(config: StackWiseConfig) -> bool:
    """Whether a block is ever left out of training."""
    return freezes_stacks(config) or config.training.unit == "block"


def streams(config: StackWiseConfig) -> bool:
    """Whether a block ever runs on a copy of its tensors."""
    elsewhere = config.training.progressive.trunk_residency != "resident" and freezes_blocks(config)
    return elsewhere or config.training.residency == "streamed"


@rule("training.compile", "training.residency", TRUNK)
def compiled_blocks_stay_in_place(config: StackWiseConfig) -> Problem | None:
    if not config.training.compile or not streams(config):
        return None
    return Problem(
        "training.compile",
        "does not go together with streamed blocks, whose tensors are elsewhere at every run",
        True,
        "false",
        "or set training.residency and training.progressive.trunk_residency to resident",
    )


@rule(
    "training.dtype",
    "training.progressive.new_stack_precision",
    "training.stages",
    "training.residency",
    TRUNK,
    "training.progressive.qlora_enabled",
)
def scaled_gradients_stay_on_the_device(config: StackWiseConfig) -> list[Problem]:
    """Adapters of a streamed trunk train in host memory as well."""
    training = config.training
    on_host = training.residency == "streamed" or (streams(config) and training.progressive.qlora_enabled)
    if not on_host:
        return []
    message = "scales the loss, and the scale cannot be taken out of gradients in host memory"
    hint = "or set training.residency and training.progressive.trunk_residency to resident"
    found = []
    if training.dtype == "float16":
        found.append(Problem("training.dtype", message, "float16", "auto, float32, bfloat16", hint))
    for key, name in precisions(config).items():
        if name == "half":
            found.append(Problem(key, message, "half", "full, bfloat16, fp8, nvfp4, nf4", hint))
    return found


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    (TRUNK, lambda c: not freezes_blocks(c), "no stack is ever frozen"),
    (
        "training.gradient_checkpointing",
        lambda c: (
            c.training.residency == "streamed"
            and (c.training.progressive.trunk_residency != "resident" or not freezes_blocks(c))
        ),
        "streamed blocks are computed again anyway",
    ),
]
