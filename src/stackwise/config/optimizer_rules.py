"""What must hold between the keys of the optimizer; see `config.rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.precision_rules import precisions
from stackwise.config.rules import rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

OWN_KEYS = {
    "AdamW": ("lr", "weight_decay", "betas", "eps"),
    "Adam": ("lr", "weight_decay", "betas", "eps"),
    "SGD": ("lr", "weight_decay", "momentum"),
    "Muon": ("lr", "weight_decay", "momentum"),
}
"""What the settings give the optimizers they know; others take the first two, and the rest as custom_params."""

EIGHT_BIT = ("AdamW", "Adam", "Muon")
"""Optimizers whose moments can be kept in eight bits."""


@rule("training.optimizer.custom_params", "training.optimizer.optimizer_type")
def custom_params_repeat_no_key(config: StackWiseConfig) -> Problem | None:
    opt = config.training.optimizer
    own = OWN_KEYS.get(opt.optimizer_type, ("lr", "weight_decay"))
    given = opt.custom_params
    if repeated := [name for name in own if name in given]:
        return Problem(
            "training.optimizer.custom_params",
            f"holds {', '.join(repeated)}",
            given,
            hint=f"set {', '.join(f'training.optimizer.{name}' for name in repeated)} instead",
        )
    if "params" in given:
        return Problem(
            "training.optimizer.custom_params", "params is filled in by the trainer", given, hint="remove it"
        )
    return None


@rule("training.optimizer.groups")
def groups_change_something(config: StackWiseConfig) -> Problem | None:
    for index, group in enumerate(config.training.optimizer.groups):
        if group.lr is None and group.weight_decay is None:
            key = f"training.optimizer.groups.{index}"
            return Problem(key, "changes nothing", {"match": group.match}, hint="give it lr or weight_decay")
    return None


@rule("training.optimizer.memory", "training.optimizer.optimizer_type")
def eight_bits_hold_known_moments(config: StackWiseConfig) -> Problem | None:
    opt = config.training.optimizer
    if opt.memory == "full" or opt.optimizer_type in EIGHT_BIT:
        return None
    return Problem(
        "training.optimizer.memory",
        f"keeps the moments of {', '.join(EIGHT_BIT)} in eight bits, not those of {opt.optimizer_type}",
        opt.memory,
        "full",
        f"or choose training.optimizer.optimizer_type {', '.join(EIGHT_BIT)}",
    )


@rule("training.optimizer.memory", "training.max_grad_norm")
def fused_steps_before_the_norm_is_known(config: StackWiseConfig) -> Problem | None:
    training = config.training
    if training.optimizer.memory != "fused" or training.max_grad_norm == 0:
        return None
    return Problem(
        "training.max_grad_norm",
        "cannot be kept under training.optimizer.memory fused, where tensors step before the norm over all of them "
        "is known",
        training.max_grad_norm,
        "0",
        "or set training.optimizer.memory to int8_nomaster",
    )


@rule("training.optimizer.memory", "training.gradient_accumulation_steps")
def fused_adds_no_gradients_up(config: StackWiseConfig) -> Problem | None:
    training = config.training
    if training.optimizer.memory != "fused" or training.gradient_accumulation_steps == 1:
        return None
    return Problem(
        "training.gradient_accumulation_steps",
        "cannot exceed 1 under training.optimizer.memory fused, where a gradient is gone before the next micro-batch",
        training.gradient_accumulation_steps,
        "1",
        "raise training.batch_size instead, with training.gradient_checkpointing if memory is short, or set "
        "training.optimizer.memory to int8_nomaster",
    )


@rule(
    "training.optimizer.memory",
    "training.dtype",
    "training.progressive.new_stack_precision",
    "training.stages",
)
def fused_has_no_scaled_gradients(config: StackWiseConfig) -> Problem | None:
    training = config.training
    if training.optimizer.memory != "fused":
        return None
    for key, value in {"training.dtype": training.dtype, **precisions(config)}.items():
        if value in ("float16", "half"):
            return Problem(
                key,
                "needs gradients that are scaled back before the step, and training.optimizer.memory fused does not "
                "wait for that",
                value,
                hint="compute in bfloat16, or set training.optimizer.memory to int8_nomaster",
            )
    return None
