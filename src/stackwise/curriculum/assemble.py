"""The rack of every stage as modules: from its description, or by changing the rack of the stage before."""

from __future__ import annotations

import torch

from stackwise.curriculum.growth import grow
from stackwise.curriculum.layout import Copies
from stackwise.curriculum.stage import Stage
from stackwise.model.init import start_spectral_norm
from stackwise.model.own_io import InOut
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec, RackSpec, StackSpec
from stackwise.model.spectral import add_spectral_norm, fold_spectral_norm
from stackwise.precision.convert import freeze_stack, restore_full_precision, shape_stack


def build_rack(spec: RackSpec, *, seed: int = 0) -> Rack:
    """The modules of a description, formats and adapters included; what is stored packed has no values yet."""
    rack = Rack(spec, seed=seed)
    for stack, described in zip(rack.stacks, spec.stacks, strict=True):
        _attach(rack, described, seed)
        shape_stack(stack, described.weight_format)
    return rack


@torch.no_grad()
def realise(
    rack: Rack, stage: Stage, spec: RackSpec, *, seed: int, merge_trunk: bool = False
) -> tuple[Rack, Copies]:
    """Change a live rack into the one `stage_spec` described; also says which new block is a copy of which old one.

    Growth comes first, while the source of a copy is still what it was trained as. A stack that trains again is
    unpacked as it is stored, so that the outputs stay. `merge_trunk`: where the rack grows, sets called `trunk` are
    folded into the weights below them and start anew (LoQT: Loeschcke et al. 2024, arXiv 2405.16528). A stack's own
    embedding, norm and head start as a copy of the rack's.
    """
    copies: Copies = {}
    if stage.grow is not None:
        if merge_trunk:
            _merge_trunk(rack, seed)
        rack, copies = grow(rack, stage.grow, seed)
    for described in spec.stacks:
        stack = next(stack for stack in rack.stacks if stack.uid == described.uid)
        stack.take_notes(described)
        if not described.own_io:
            stack.io = None
        elif stack.io is None:
            stack.io = InOut(spec).copy_from(rack)
        if stack.spectral and not described.spectral:
            fold_spectral_norm(stack)
        if described.weight_format == "fp32" and stack.weight_format != "fp32":
            restore_full_precision(stack)
        elif described.weight_format != stack.weight_format:
            freeze_stack(stack, described.weight_format)
        if described.spectral and not stack.spectral:
            add_spectral_norm(stack)
            start_spectral_norm(stack, seed, f"stacks.{stack.uid}.")
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


def _merge_trunk(rack: Rack, seed: int) -> None:
    for stack in rack.stacks:
        if any(adapters.name == "trunk" for adapters in stack.adapters):
            from stackwise.adapters.merge import merge_and_requantise

            merge_and_requantise(stack, "trunk", seed, restart=len(rack.stacks))
