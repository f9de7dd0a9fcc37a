"""Keys of `generation` that do not go together, or have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.objective_rules import OBJECTIVE, TIME, masks, time_of
from stackwise.config.rules import rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

MASKED = ("sampler", "steps", "grid", "block_length", "threshold")
"""Keys of filling masked positions."""
STEPWISE = ("ancestral", "confidence", "remask")
ONE_SWEEP = ("unroll", "stream")


@rule("generation.block_length", "generation.sampler")
def one_sweep_has_no_blocks(config: StackWiseConfig) -> Problem | None:
    generation = config.generation
    if generation.block_length is None or generation.sampler not in ONE_SWEEP:
        return None
    return Problem(
        "generation.block_length",
        f"cannot be set for the sampler {generation.sampler}, which goes through the stacks once for the whole length",
        generation.block_length,
        "null",
        "or choose another generation.sampler",
    )


@rule("generation.sampler", OBJECTIVE, TIME)
def one_sweep_needs_intervals(config: StackWiseConfig) -> Problem | None:
    from stackwise.config.notes import tunes_jointly

    if config.generation.sampler not in ONE_SWEEP or not masks(config):
        return None
    if time_of(config) == "depth" and not tunes_jointly(config):
        return None
    return Problem(
        "generation.sampler",
        "goes from interval to interval of noise, and no stack of this run ends up with one of its own",
        config.generation.sampler,
        "ancestral, confidence, threshold, remask",
    )


def _causal(config: StackWiseConfig) -> bool:
    return bool(config.model.attention["attention_mode"] == "causal")


def _sampler_is_not(*names: str) -> Callable[[StackWiseConfig], bool]:
    return lambda config: not _causal(config) and config.generation.sampler not in names


def _greedy(config: StackWiseConfig) -> bool:
    return config.generation.temperature == 0


def _draws_nothing(config: StackWiseConfig) -> bool:
    return _greedy(config) and (_causal(config) or config.generation.sampler != "ancestral")


def _sampler(config: StackWiseConfig) -> str:
    return f"generation.sampler is {config.generation.sampler}"


Reason = str | Callable[["StackWiseConfig"], str]

INERT: list[tuple[str, Callable[[StackWiseConfig], bool], Reason]] = [
    ("generation.top_k", _greedy, "temperature 0 is greedy"),
    ("generation.top_p", _greedy, "temperature 0 is greedy"),
    ("generation.seed", _draws_nothing, "temperature 0 is greedy"),
    *((f"generation.{key}", _causal, "a causal model continues token by token") for key in MASKED),
    *((f"generation.{key}", _sampler_is_not(*STEPWISE), _sampler) for key in ("steps", "grid")),
    ("generation.threshold", _sampler_is_not("threshold"), _sampler),
    (
        "generation.repetition_penalty",
        lambda c: not _causal(c),
        "a model that sees both directions fills masked positions",
    ),
]
