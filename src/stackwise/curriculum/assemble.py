"""The rack of every stage, first as a description, then as modules.

A stage may grow the rack, freeze stacks into their storage format, and attach adapter sets. All of it is decided on
descriptions (`stage_spec`), which planning and checkpoints share; `realise` then changes the modules to match.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from stackwise.curriculum.growth import grow
from stackwise.curriculum.layout import Copies, grow_spec
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec, RackSpec, StackSpec
from stackwise.precision.convert import freeze_stack, restore_full_precision, shape_stack
from stackwise.precision.modes import frozen_format, mode_of

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def first_spec(config: StackWiseConfig, stages: list[Stage]) -> RackSpec:
    """The rack that the first stage finds, before it does anything."""
    return rack_spec(config, stages[0].n_stacks)


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
    held = {stack.uid for stack in before.stacks}
    taught = any(stack.trained for stack in before.stacks)
    copied = taught and stage.grow is not None and stage.grow.init != "random"
    stacks = [
        stack if stack.uid in held and taught else _newborn(config, stack, stage, copied)
        for stack in grown.stacks
    ]
    spec = grown.with_stacks(stacks)
    units = trained_units(spec, stage)
    return spec.with_stacks([_stored(stack, stage, units, run_format) for stack in stacks])


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


def _stored(stack: StackSpec, stage: Stage, units: set[str], run_format: str) -> StackSpec:
    """The stack as the stage stores it: fp32 while its matrices train, its frozen format once it has learned."""
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
        return replace(stack, weight_format="fp32", trained=True)
    if stack.weight_format != "fp32" or not stack.trained:
        return stack
    return replace(stack, weight_format=stack.frozen_format or run_format)


def build_rack(spec: RackSpec, *, seed: int = 0) -> Rack:
    """The modules of a description, formats and adapters included; what is stored packed has no values yet."""
    rack = Rack(spec, seed=seed)
    for stack, described in zip(rack.stacks, spec.stacks, strict=True):
        _attach(rack, described, seed)
        shape_stack(stack, described.weight_format)
    return rack


@torch.no_grad()
def realise(rack: Rack, stage: Stage, spec: RackSpec, *, seed: int) -> tuple[Rack, Copies]:
    """Change a live rack into the one `stage_spec` described; also says which new block is a copy of which old one.

    Growth comes first, while the source of a copy is still what it was trained as. A stack that trains again is
    unpacked as it is stored, so that the outputs stay.
    """
    copies: Copies = {}
    if stage.grow is not None:
        rack, copies = grow(rack, stage.grow, seed)
    for described in spec.stacks:
        stack = next(stack for stack in rack.stacks if stack.uid == described.uid)
        stack.take_notes(described)
        if described.weight_format == "fp32" and stack.weight_format != "fp32":
            restore_full_precision(stack)
        elif described.weight_format != stack.weight_format:
            freeze_stack(stack, described.weight_format)
        _attach(rack, described, seed)
    rack.spec = spec
    return rack, copies


def _attach(rack: Rack, described: StackSpec, seed: int) -> None:
    """Give a stack the adapter sets its description has."""
    stack = next(stack for stack in rack.stacks if stack.uid == described.uid)
    missing: list[AdapterSpec] = [a for a in described.adapters if a not in stack.adapters]
    if missing:
        from stackwise.adapters.attach import attach

        for adapters in missing:
            attach(stack, adapters, seed=seed, prefix=f"stacks.{stack.uid}.")
