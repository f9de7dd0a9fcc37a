"""Rules about precision, and its keys that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import program_of, rule, stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

KEY = "training.progressive."


def precisions(config: StackWiseConfig) -> dict[str, str]:
    """Every precision that somebody has given to new stacks, under its key."""
    given = {KEY + "new_stack_precision": config.training.progressive.new_stack_precision}
    for i, stage in enumerate(config.training.stages or ()):
        given[f"training.stages.{i}.precision"] = stage.precision
    return {key: name for key, name in given.items() if name is not None}


@rule(KEY + "new_stack_precision", KEY + "qlora_enabled", "training.stages")
def qlora_stacks_have_adapters(config: StackWiseConfig) -> list[Problem]:
    if config.training.progressive.qlora_enabled:
        return []
    return [
        Problem(
            key,
            "trains adapters over a base that stays as it is, but training.progressive.qlora_enabled is false",
            "qlora",
            hint="set training.progressive.qlora_enabled to true, or choose nf4, which trains the weights and stores "
            "them as nf4 afterwards",
        )
        for key, name in precisions(config).items()
        if name == "qlora"
    ]


@rule(KEY + "trunk_precision", KEY + "new_stack_precision")
def qlora_bases_are_nf4(config: StackWiseConfig) -> Problem | None:
    progressive = config.training.progressive
    if progressive.new_stack_precision != "qlora" or progressive.trunk_precision in (None, "nf4"):
        return None
    return Problem(
        KEY + "trunk_precision",
        "cannot be chosen: the base of a qlora stack is stored as nf4 from the start",
        progressive.trunk_precision,
        "nf4, null",
    )


@rule(KEY + "trunk_precision", KEY + "new_stack_precision", KEY + "building_mode")
def visited_stacks_rest_in_full(config: StackWiseConfig) -> Problem | None:
    progressive = config.training.progressive
    stored, mode = progressive.trunk_precision, progressive.new_stack_precision
    if program_of(config) != "cyclic" or stored == "fp32" or (stored is None and mode in (None, "full")):
        return None
    return Problem(
        KEY + "trunk_precision",
        "would round every stack again after each of its visits under cyclic",
        stored,
        "fp32",
        f"new_stack_precision {mode} names the format; fp32 here overrules it"
        if stored is None
        else "a lossy format is for stacks that are done, as under append",
    )


def freezes_stacks(config: StackWiseConfig) -> bool:
    """Whether the run ever leaves a trained stack out of training."""
    program, strategy = program_of(config), config.training.progressive.trunk_strategy
    if program == "end_to_end":
        return strategy == "qlora"
    if program in ("append", "prepend"):
        return strategy != "trainable" and stacks_at_the_end(config) > 1
    return program == "by_hand" or (program in ("independent", "cyclic") and stacks_at_the_end(config) > 1)


def _stores_in_full(config: StackWiseConfig) -> bool:
    chosen = config.training.progressive.trunk_precision
    given = precisions(config)
    all_own = KEY + "new_stack_precision" in given or _stages_say_it(config)
    return chosen == "fp32" or (chosen is None and all_own and set(given.values()) == {"full"})


def _stages_say_it(config: StackWiseConfig) -> bool:
    """Whether every stage in which stacks join has a precision of its own."""
    listed = config.training.stages or []
    joining = [stage for i, stage in enumerate(listed) if i == 0 or stage.grow is not None]
    return bool(joining) and all(stage.precision is not None for stage in joining)


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    (
        KEY + "trunk_precision",
        lambda c: not freezes_stacks(c) and not c.training.progressive.fake_quant,
        "no stack is ever frozen",
    ),
    (
        KEY + "new_stack_precision",
        lambda c: c.checkpoint.init_from is None and _stages_say_it(c),
        "every stage in which stacks join has a precision of its own",
    ),
    (KEY + "fake_quant", _stores_in_full, "frozen stacks are stored in fp32, which rounds nothing"),
]
"""Key, when it has no effect, and why."""
