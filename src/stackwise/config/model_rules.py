"""Rules between the parts of a model, and keys of parts that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import program_of, rule, stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

SCALING = "model.rope_scaling"


@rule(SCALING, "model.pos_encoding", "model.use_rope")
def scaled_positions_are_rotary(config: StackWiseConfig) -> Problem | None:
    if config.model.rope_scaling is None or config.model.positions == "rope":
        return None
    message = f"scales rotary positions, but model.pos_encoding is {config.model.positions}"
    return Problem(SCALING, message, hint="remove it or set model.pos_encoding to rope")


@rule(SCALING, "model.max_seq_len", "model.head_dim", "model.d_model", "model.n_heads")
def rope_scaling_fits(config: StackWiseConfig) -> Problem | None:
    """What the description says about type, fields and lengths, under the key that is to blame."""
    keys = config.model.rope_scaling
    if keys is None or config.model.positions != "rope":
        return None
    if keys.factor is None and keys.original_max_seq_len is None:
        message = (
            "says neither factor nor original_max_seq_len, so it is open how far positions are stretched"
        )
        return Problem(SCALING, message, hint="set model.rope_scaling.factor, or the length that was trained")
    trained = keys.original_max_seq_len
    if trained is not None and trained > config.model.max_seq_len:
        message = f"exceeds model.max_seq_len {config.model.max_seq_len}, the longest row"
        hint = "set model.max_seq_len to the length to reach"
        return Problem(f"{SCALING}.original_max_seq_len", message, trained, hint=hint)
    longest = config.model.max_seq_len
    if keys.factor is not None and not 1 <= keys.factor <= longest:
        message = "stretches from less than a token, or shrinks"
        return Problem(f"{SCALING}.factor", message, keys.factor, f"1 to model.max_seq_len {longest}")
    try:
        scaling = config.model.scaled_rope
    except ValueError as error:
        return Problem(SCALING, str(error))
    assert scaling is not None
    fields = config.model.attention
    width = config.model.head_dim or config.model.d_model // config.model.n_heads
    if fields["attention_type"] == "mla":
        width = fields["mla_rope_dim"]
    return next((Problem(SCALING, text) for text in scaling.problems_of(width)), None)


@rule("model.full_block", "model.window_every")
def full_block_is_one_of_them(config: StackWiseConfig) -> Problem | None:
    place, every = config.model.full_block, config.model.window_every
    if place is None or place < max(every, 1) or every == 1:
        return None
    return Problem(
        "model.full_block", f"is not among {every} blocks (model.window_every)", place, f"0 to {every - 1}"
    )


@rule("model.parallel_layers", "model.norm_placement", "model.first_norm")
def parallel_layers_have_one_norm(config: StackWiseConfig) -> Problem | None:
    model = config.model
    if not model.parallel_layers or (model.norm_placement == "pre" and model.first_norm):
        return None
    if model.norm_placement != "pre":
        message = (
            f"needs model.norm_placement pre, not {model.norm_placement}: one norm feeds both sub-layers"
        )
        return Problem("model.parallel_layers", message, True, hint="set model.norm_placement to pre")
    message = "has one norm for both sub-layers, and model.first_norm false takes it away"
    return Problem("model.parallel_layers", message, True, hint="set model.first_norm to true")


@rule("model.first_norm", "model.norm_placement")
def first_norm_is_one_that_can_go(config: StackWiseConfig) -> Problem | None:
    if config.model.first_norm or config.model.norm_placement != "post":
        return None
    message = "leaves out a norm in front of attention, where model.norm_placement post has none"
    return Problem("model.first_norm", message, False, "true")


@rule(
    "model.window_every",
    "model.first_norm",
    "model.architecture",
    "model.stacks",
    "training.unit",
    "training.progressive.building_mode",
)
def grown_stacks_repeat_the_pattern(config: StackWiseConfig) -> list[Problem]:
    """Grown stacks repeat the blocks of a neighbour, so each needs whole periods of what differs by block."""
    if not grows_stacks(config):
        return []
    model, found = config.model, []
    sizes = {stack.n_blocks or model.architecture.blocks_per_stack for stack in model.stacks or ()}
    sizes = sizes or {model.architecture.blocks_per_stack}
    every = model.window_every if model.sliding_window is not None else 1
    if any(size % every for size in sizes):
        message = f"does not divide the {', '.join(map(str, sorted(sizes)))} blocks of a stack, which growth repeats"
        hint = "or train all stacks at once (training.progressive.enabled false)"
        found.append(Problem("model.window_every", message, every, hint=hint))
    if not model.first_norm:
        message = "makes the first block another one, but growth repeats its stack"
        hint = "train all stacks at once (training.progressive.enabled false)"
        found.append(Problem("model.first_norm", message, False, "true", hint))
    return found


@rule("model.stacks", "model.sliding_window", "model.moe.n_experts")
def stacks_leave_out_what_is_there(config: StackWiseConfig) -> list[Problem]:
    """A stack that does without windows or experts, in a model without them, was meant otherwise."""
    model, found = config.model, []
    for i, stack in enumerate(model.stacks or ()):
        if not stack.windowed and model.sliding_window is None:
            message = "leaves out the window, but model.sliding_window is null"
            found.append(Problem(f"model.stacks.{i}.windowed", message, False, "true"))
        if not stack.experts and not model.moe.n_experts:
            message = "leaves out the experts, but model.moe.n_experts is 0"
            found.append(Problem(f"model.stacks.{i}.experts", message, False, "true"))
    return found


def grows_stacks(config: StackWiseConfig) -> bool:
    """Whether stacks are added that repeat the blocks of others."""
    records = config.training.stages or ()
    if program_of(config) == "by_hand":
        return any(record.grow is not None for record in records)
    return program_of(config) in ("append", "prepend", "grow") and stacks_at_the_end(config) > 1


def _no_window(config: StackWiseConfig) -> bool:
    return config.model.sliding_window is None


def _all_local(config: StackWiseConfig) -> bool:
    model = config.model
    return not _no_window(config) and model.window_every == 1 and model.local_rope_theta is not None


WINDOWED = "every block has a window, and model.local_rope_theta is set"

INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    *(
        (f"model.{name}", _no_window, "model.sliding_window is null")
        for name in ("window_every", "full_block", "attention_sinks", "local_rope_theta")
    ),
    ("model.full_block", lambda c: c.model.window_every == 1, "every block has the window"),
    ("model.local_rope_theta", lambda c: c.model.positions != "rope", "positions are not rotary"),
    *((f"model.{name}", _all_local, WINDOWED) for name in ("rope_theta", "rope_scaling")),
]
"""Key, when it has no effect, and why."""
