"""Rules, notes and advice about time: what the keys of `training.progressive` and of stages say about noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.objective_rules import OBJECTIVE, TIME, masks, time_of
from stackwise.config.rules import program_of, rule, stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

KEYS = "training.progressive"
POINTS = f"{KEYS}.time_step_mask_fractions"
DEPTH_MODES = ("independent", "prepend", "append")


@rule(TIME, f"{KEYS}.building_mode", f"{KEYS}.enabled", "training.unit")
def depth_needs_stacks_with_noise_of_their_own(config: StackWiseConfig) -> Problem | None:
    if time_of(config) != "depth" or not masks(config) or program_of(config) in (*DEPTH_MODES, "by_hand"):
        return None
    message = "gives every stack noise of its own, but no stack has a stage of its own"
    hint = f"set {KEYS}.building_mode to {', '.join(DEPTH_MODES[:-1])} or {DEPTH_MODES[-1]}"
    return Problem(TIME, message, "depth", "auto, input, none", hint)


@rule(
    f"{KEYS}.time_step_mask_fractions",
    f"{KEYS}.num_time_steps",
    f"{KEYS}.time_per_stack",
    f"{KEYS}.stack_time_mapping",
    f"{KEYS}.time_boundaries",
    f"{KEYS}.time_overlap",
    "objective.min_mask_fraction",
    "objective.max_mask_fraction",
    "objective.mask_schedule_type",
    f"{KEYS}.target_stacks",
    "model.architecture.n_stacks",
    TIME,
)
def stacks_share_out_the_noise(config: StackWiseConfig) -> list[Problem]:
    """The horizon, the boundaries and the point masks fit the number of stacks."""
    if time_of(config) != "depth" or not masks(config):
        return []
    low, high = config.objective.min_mask_fraction, config.objective.max_mask_fraction
    if config.training.progressive.time_step_mask_fractions == "schedule" and low > high:
        return []  # a rule of the section objective
    from stackwise.objectives.depth import stack_noise

    try:
        stack_noise(config, stacks_at_the_end(config))
    except ConfigError as error:
        return error.problems
    return []


@rule("training.stages", OBJECTIVE)
def noise_of_stages_is_a_range(config: StackWiseConfig) -> list[Problem]:
    found = []
    for i, stage in enumerate(config.training.stages or ()):
        for name in ("noise", "eval_noise"):
            given, key = getattr(stage, name), f"training.stages.{i}.{name}"
            if given is None:
                continue
            if not masks(config):
                objective = config.training.progressive.training_objective
                hint = f"remove it, or set {OBJECTIVE} to diffusion or mlm"
                found.append(Problem(key, f"the objective {objective} hides no tokens", given, hint=hint))
            elif given[0] > given[1]:
                found.append(Problem(key, "is no range", given, "[lo, hi], lo <= hi"))
    return found


def _is_not(*meanings: str) -> Callable[[StackWiseConfig], bool]:
    return lambda c: time_of(c) not in meanings


def _why(config: StackWiseConfig) -> str:
    given = config.training.progressive.time_interpretation
    return f"{TIME} is {time_of(config)}" + (" here" if given == "auto" else "")


def _has_table(config: StackWiseConfig) -> bool:
    """Whether the model looks time up by its step."""
    return time_of(config) == "input" and config.training.progressive.time_encoding_type == "learned"


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str | Callable[[StackWiseConfig], str]]] = [
    *(
        (f"{KEYS}.{name}", _is_not("depth"), _why)
        for name in ("stack_time_mapping", "time_boundaries", "time_overlap", "time_step_mask_fractions")
    ),
    *(
        (f"{KEYS}.{name}", _is_not("input"), _why)
        for name in ("time_embedding_dim", "time_encoding_type", "time_sampling", "time_conditioning")
    ),
    *((f"{KEYS}.{name}", _is_not("depth", "input"), _why) for name in ("num_time_steps", "time_per_stack")),
    *(
        (
            f"{KEYS}.{name}",
            lambda c: time_of(c) == "input" and not _has_table(c),
            f"only {KEYS}.time_encoding_type learned has steps",
        )
        for name in ("num_time_steps", "time_per_stack")
    ),
    (
        f"{KEYS}.time_per_stack",
        lambda c: _has_table(c) and c.training.progressive.num_time_steps is not None,
        f"{KEYS}.num_time_steps wins",
    ),
    *(
        (
            f"{KEYS}.{name}",
            lambda c: time_of(c) == "depth" and c.training.progressive.time_step_mask_fractions is not None,
            f"{POINTS} wins",
        )
        for name in ("stack_time_mapping", "time_boundaries", "time_overlap")
    ),
    (
        f"{KEYS}.time_boundaries",
        lambda c: time_of(c) == "depth" and c.training.progressive.stack_time_mapping != "custom",
        f"{KEYS}.stack_time_mapping is not custom",
    ),
    (
        f"{KEYS}.time_overlap",
        lambda c: time_of(c) == "depth" and program_of(c) == "by_hand",
        "training.stages says what each stage trains on",
    ),
    *(
        (
            f"objective.{name}",
            lambda c: masks(c) and not (time_of(c) == "depth" and _points(c) == "schedule"),
            f"{POINTS} is not schedule",
        )
        for name in ("max_mask_fraction", "mask_schedule_type")
    ),
    (
        "objective.min_mask_fraction",
        lambda c: (
            masks(c)
            and not (
                time_of(c) == "depth"
                and (
                    _points(c) == "schedule"
                    or (_points(c) is None and c.training.progressive.stack_time_mapping == "exponential")
                )
            )
        ),
        f"neither {POINTS} is schedule nor {KEYS}.stack_time_mapping exponential",
    ),
]


def _points(config: StackWiseConfig) -> object:
    return config.training.progressive.time_step_mask_fractions


def _full_masks(config: StackWiseConfig) -> bool:
    """Whether a stack is trained on rows in which every token is hidden."""
    given = _points(config)
    if given == "schedule":
        return config.objective.max_mask_fraction == 1
    shares = given.values() if isinstance(given, dict) else given if isinstance(given, list) else ()
    return 1.0 in shares


ADVICE: list[tuple[Callable[[StackWiseConfig], bool], str]] = [
    (
        lambda c: masks(c) and time_of(c) == "depth" and program_of(c) == "append",
        f"{TIME} depth under append: older stacks, next to the embedding, then run under less noise than they were "
        "trained on; prepend and independent keep every stack at its own",
    ),
    (
        lambda c: masks(c) and time_of(c) == "depth" and _points(c) is not None,
        f"{POINTS} trains each stack at one share of masked tokens: the shares between have no stack, so no bound of "
        "the likelihood is reported",
    ),
    (
        lambda c: masks(c) and time_of(c) == "depth" and _full_masks(c),
        f"{POINTS} holds a share of 1: that stack sees no token at all",
    ),
]
