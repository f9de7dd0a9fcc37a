"""Rules about mixtures of experts, and their keys that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import copies_stacks, divisors, program_of, rule, stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.model.moe_settings import MoeSettings


@rule("model.moe.n_experts", "model.moe.top_k", "model.moe.groups", "model.moe.top_groups")
def experts_can_be_chosen(config: StackWiseConfig) -> Problem | None:
    moe = config.model.moe
    n, groups = moe.n_experts, moe.groups
    if not n:
        return None
    if moe.top_k > n:
        hint = "or raise model.moe.n_experts"
        return Problem(
            "model.moe.top_k",
            f"exceeds model.moe.n_experts {n}",
            moe.top_k,
            f"whole number from 1 to {n}",
            hint,
        )
    if n % groups:
        return Problem("model.moe.groups", f"must divide model.moe.n_experts {n}", groups, divisors(n))
    if moe.top_groups > groups:
        message = f"exceeds model.moe.groups {groups}"
        return Problem("model.moe.top_groups", message, moe.top_groups, f"whole number from 1 to {groups}")
    held = moe.top_groups * (n // groups)
    if moe.top_k > held:
        message = f"exceeds the {held} experts of {moe.top_groups} of {groups} groups"
        return Problem(
            "model.moe.top_k",
            message,
            moe.top_k,
            hint="raise model.moe.top_groups, or lower model.moe.groups",
        )
    return None


def _sizes(config: StackWiseConfig) -> list[int]:
    """Blocks of every stack of the finished rack."""
    each, count = config.model.architecture.blocks_per_stack, stacks_at_the_end(config)
    return [stack.n_blocks or each for stack in config.model.stacks or ()] or [each] * count


def _next_with_experts(moe: MoeSettings, layer: int) -> int:
    """The first layer with experts from `layer` on."""
    first = moe.first_dense + moe.every - 1
    return max(first, first + -(-(layer - first) // moe.every) * moe.every)


@rule(
    "model.moe.every",
    "model.moe.first_dense",
    "model.moe.n_experts",
    "model.stacks",
    "model.architecture",
    "training.progressive.target_stacks",
)
def some_layer_has_experts(config: StackWiseConfig) -> Problem | None:
    moe, layers = config.model.moe, sum(_sizes(config))
    if not moe.n_experts or _next_with_experts(moe, 0) < layers:
        return None
    key = "first_dense" if moe.first_dense >= layers else "every"
    message = f"leaves none of the {layers} layers with experts"
    return Problem(
        f"model.moe.{key}", message, getattr(moe, key), hint="lower it, or set model.moe.n_experts to 0"
    )


@rule(
    "model.moe.every",
    "model.moe.first_dense",
    "model.moe.n_experts",
    "model.stacks",
    "model.architecture",
    "training.progressive.building_mode",
    "training.progressive.new_stack_init",
    "training.progressive.shared_start_fraction",
)
def copies_have_experts_where_their_source_has(config: StackWiseConfig) -> Problem | None:
    moe, init = config.model.moe, config.training.progressive.new_stack_init
    shared = config.training.progressive.shared_start_fraction > 0
    grows = program_of(config) == "grow" or (program_of(config) == "independent" and shared)
    if not moe.n_experts or not (copies_stacks(config) or grows) or (init == "random" and not grows):
        return None
    kinds, first = set(), 0
    for size in _sizes(config):
        kinds.add((size, min(size, _next_with_experts(moe, first) - first)))  # from there on, every so many
        first += size
    if len(kinds) == 1:
        return None
    key = "first_dense" if moe.first_dense else "every"
    hint = "make every stack alike (first_dense 0, and blocks_per_stack a multiple of every)"
    return Problem(
        f"model.moe.{key}",
        "gives stacks experts in other places than the stacks they are copied from have them",
        getattr(moe, key),
        hint=hint if grows else f"{hint}, or set training.progressive.new_stack_init to random",
    )


def _dense(config: StackWiseConfig) -> bool:
    return not config.model.moe.n_experts


_OF_EXPERTS = (
    "top_k",
    "n_shared",
    "d_ff",
    "router",
    "normalise",
    "scale",
    "groups",
    "top_groups",
    "balancing",
    "aux_weight",
    "bias_rate",
    "z_weight",
    "every",
    "first_dense",
)

INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    *((f"model.moe.{name}", _dense, "model.moe.n_experts is 0") for name in _OF_EXPERTS),
    (
        "model.moe.aux_weight",
        lambda c: not _dense(c) and c.model.moe.balancing != "aux",
        "model.moe.balancing is bias",
    ),
    (
        "model.moe.bias_rate",
        lambda c: not _dense(c) and c.model.moe.balancing != "bias",
        "model.moe.balancing is aux",
    ),
    (
        "model.moe.normalise",
        lambda c: (
            c.model.moe.n_experts > 0
            and c.model.moe.router == "softmax"
            and c.model.moe.top_k == c.model.moe.n_experts
        ),
        "the weights of all experts add up to 1",
    ),
]
"""Key, when it has no effect, and why."""
