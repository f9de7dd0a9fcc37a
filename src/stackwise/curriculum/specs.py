"""The rack of every stage as a description: what grew, how each stack is stored, which adapter sets it has.

Checks, plans and checkpoints work on these; `curriculum.assemble` turns them into modules. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from stackwise.config.rules import program_of
from stackwise.curriculum.layout import grow_spec
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec, stack_blocks
from stackwise.model.spec import RackSpec, StackSpec
from stackwise.precision.modes import frozen_format, mode_of

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def first_spec(config: StackWiseConfig, stages: list[Stage]) -> RackSpec:
    """The rack that the first stage finds, before it does anything.

    Stacks are named in the order of building. Those of a prepend run, and stacks that train alone, are built from the
    head on, so that the first is next to it; of the latter only those that train here are there.
    """
    spec, blocks = rack_spec(config), stack_blocks(config)
    progressive, count, program = config.training.progressive, stages[0].n_stacks, program_of(config)
    mode = progressive.building_mode if program == "by_hand" else program
    if mode == "independent":
        last = len(blocks) - 1
        chosen = sorted(progressive.train_stacks or range(len(blocks)))[-count:]
        return spec.with_stacks([StackSpec(f"s{last - p}", blocks[p], last - p) for p in chosen])
    first = blocks[len(blocks) - count :] if mode == "prepend" else blocks[:count]
    loaded = config.checkpoint.init_from is not None
    return spec.with_stacks([StackSpec(f"s{i}", stack, i, trained=loaded) for i, stack in enumerate(first)])


def stage_specs(
    config: StackWiseConfig, stages: Iterable[Stage], first: RackSpec, run_format: str
) -> list[RackSpec]:
    """The rack each stage trains, in order, from the one the first finds."""
    specs, spec = [], first
    for stage in stages:
        spec = stage_spec(config, spec, stage, run_format)
        specs.append(spec)
    return specs


def stage_spec(config: StackWiseConfig, before: RackSpec, stage: Stage, run_format: str) -> RackSpec:
    """The rack a stage trains, from the one the last stage left.

    `run_format`: how stacks without a format of their own are stored once they freeze
    (`precision.modes.frozen_format`). Adapters that would train over weights that never learned: ValueError.
    """
    grown = before if stage.grow is None else grow_spec(before, stage.grow)
    joining = newcomers(before, grown)
    taught = any(stack.trained for stack in before.stacks)
    copied = taught and stage.grow is not None and stage.grow.init != "random"
    stacks = [
        # a copy that waits for its own stage has not trained: it is not stored as if it were done
        _newborn(config, stack, stage, copied and stage.alone in (None, stack.build_index))
        if stack.uid in joining
        else stack
        for stack in grown.stacks
    ]
    if config.training.progressive.qlora_enabled:
        newest = max(stacks, key=lambda stack: stack.build_index).uid
        arrived = taught and grown is not before
        stacks = [_with_sets(config, stack, arrived and stack.uid != newest) for stack in stacks]
    spec = grown.with_stacks(stacks)
    units = trained_units(spec, stage)
    spectral = config.model.spectral_norm
    stacks = [_with_io(stack, stage, units) for stack in stacks]
    return spec.with_stacks([_stored(stack, stage, units, run_format, spectral) for stack in stacks])


def newcomers(before: RackSpec, grown: RackSpec) -> set[str]:
    """Stacks that join the rack in a stage: what it grows, and everything where nothing has trained yet."""
    if not any(stack.trained for stack in before.stacks):
        return {stack.uid for stack in grown.stacks}
    return {stack.uid for stack in grown.stacks} - {stack.uid for stack in before.stacks}


def _newborn(config: StackWiseConfig, stack: StackSpec, stage: Stage, trained: bool) -> StackSpec:
    """A stack that has not trained yet: the mode its stage or the config gives it."""
    progressive = config.training.progressive
    name = stage.precision or progressive.new_stack_precision
    if name is None:
        return replace(stack, trained=trained)
    mode = mode_of(name)
    return replace(
        stack,
        trained=trained,
        compute_dtype=mode.compute_dtype,
        frozen_format=frozen_format(progressive, name),
        adapters_only=mode.adapters,
    )


def _with_sets(config: StackWiseConfig, stack: StackSpec, is_trunk: bool) -> StackSpec:
    """The stack with the adapter sets that it lacks."""
    from stackwise.adapters.ranks import set_of

    progressive = config.training.progressive
    wanted = ["stack", *(["trunk"] if is_trunk and progressive.progressive_qlora else [])]
    have = {adapters.name for adapters in stack.adapters}
    new = tuple(set_of(progressive, name, stack.build_index) for name in wanted if name not in have)
    return replace(stack, adapters=stack.adapters + new)


def _with_io(stack: StackSpec, stage: Stage, units: set[str]) -> StackSpec:
    """The stack with an embedding, norm and head of its own from the stage on that trains them, to where the whole rack
    runs, which has use for one embedding and head alone."""
    trains = f"io:{stack.uid}" in units
    if trains and stage.alone != stack.build_index:
        raise ValueError(
            f"stage {stage.name!r} trains embedding and head of stack {stack.uid!r}, which does not run alone in it; "
            f"set alone to {stack.build_index}"
        )
    return replace(stack, own_io=stage.alone is not None and (trains or stack.own_io))


def _stored(stack: StackSpec, stage: Stage, units: set[str], run_format: str, spectral: bool) -> StackSpec:
    """The stack as the stage stores it: fp32 while its matrices train, `spectral` where the config wants it, and its
    frozen format once it has learned."""
    adapting = any(unit.startswith("lora.") and unit.endswith(f":{stack.uid}") for unit in units)
    training = any(u == f"stack:{stack.uid}" or u.startswith(f"block:{stack.uid}.") for u in units)
    if adapting and not training and not stack.trained:
        raise ValueError(
            f"stage {stage.name!r} trains adapters on stack {stack.uid!r}, whose weights have never learned anything: "
            "adapters refine a trained model and do not train one (GaLore, arXiv 2403.03507, table 2). Train the stack "
            "itself first (training.progressive.trunk_strategy frozen or trainable), start it as a copy of a trained "
            "one (new_stack_init copy), or start from a trained run (checkpoint.init_from)"
        )
    if training:
        return replace(stack, weight_format="fp32", trained=True, spectral=spectral)
    stack = replace(stack, spectral=False)
    if stack.weight_format != "fp32" or not stack.trained:
        return stack
    return replace(stack, weight_format=stack.frozen_format or run_format)
