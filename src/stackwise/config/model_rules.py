"""Rules between the parts of a model, and keys of parts that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import rule

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
def rope_scaling_fits(config: StackWiseConfig) -> list[Problem]:
    """What the description says about type, fields and lengths, under the key that is to blame."""
    keys = config.model.rope_scaling
    if keys is None or config.model.positions != "rope":
        return []
    if keys.factor is None and keys.original_max_seq_len is None:
        message = (
            "says neither factor nor original_max_seq_len, so it is open how far positions are stretched"
        )
        return [
            Problem(SCALING, message, hint="set model.rope_scaling.factor, or the length that was trained")
        ]
    trained = keys.original_max_seq_len
    if trained is not None and trained > config.model.max_seq_len:
        message = f"exceeds model.max_seq_len {config.model.max_seq_len}, the longest row"
        hint = "set model.max_seq_len to the length to reach"
        return [Problem(f"{SCALING}.original_max_seq_len", message, trained, hint=hint)]
    try:
        scaling = config.model.scaled_rope
    except ValueError as error:
        return [Problem(SCALING, str(error))]
    assert scaling is not None
    fields = config.model.attention
    width = config.model.head_dim or config.model.d_model // config.model.n_heads
    if fields["attention_type"] == "mla":
        width = fields["mla_rope_dim"]
    return [Problem(SCALING, text) for text in scaling.problems_of(width)]


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = []
"""Key, when it has no effect, and why."""
