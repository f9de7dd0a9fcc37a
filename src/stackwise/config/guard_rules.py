"""What must hold between the keys of the numerics guard; see `config.rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.precision_rules import precisions
from stackwise.config.rules import rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


@rule("training.optimizer.memory", "training.on_nonfinite", "training.spike_policy", "training.recheck")
def fused_cannot_take_a_step_back(config: StackWiseConfig) -> list[Problem]:
    training = config.training
    if training.optimizer.memory != "fused":
        return []
    found = {
        "training.on_nonfinite": training.on_nonfinite == "skip",
        "training.spike_policy": training.spike_policy == "skip",
        "training.recheck": training.recheck,
    }
    allowed = {"training.on_nonfinite": "stop, rollback", "training.spike_policy": "off, warn, rollback"}
    return [
        Problem(
            key,
            "needs steps that can be left out, and under training.optimizer.memory fused part of the step is taken "
            "before its gradient is known",
            getattr(training, key.rpartition(".")[2]),
            allowed.get(key, "false"),
            "or set training.optimizer.memory to int8_nomaster",
        )
        for key, broken in found.items()
        if broken
    ]


@rule("training.recheck", "training.deterministic")
def computing_twice_gives_the_same_bits(config: StackWiseConfig) -> Problem | None:
    training = config.training
    if not training.recheck or training.deterministic:
        return None
    return Problem(
        "training.recheck",
        "takes another result for a fault of the hardware, which it is with training.deterministic only",
        True,
        hint="set training.deterministic to true",
    )


@rule("training.recheck", "training.dtype", "training.progressive.new_stack_precision", "training.stages")
def scaled_gradients_are_not_computed_twice(config: StackWiseConfig) -> list[Problem]:
    training = config.training
    given = {"training.dtype": training.dtype, **precisions(config)}
    return [
        Problem(
            key, "scales gradients, which training.recheck cannot compute again", value, hint="use bfloat16"
        )
        for key, value in given.items()
        if training.recheck and value in ("float16", "half")
    ]


INERT = [
    *(
        (f"training.{name}", lambda c: c.training.spike_policy == "off", "training.spike_policy is off")
        for name in ("spike_sigma", "spike_window")
    ),
    (
        "training.rollback_steps",
        lambda c: c.training.spike_policy != "rollback",
        "training.spike_policy is not rollback",
    ),
]
