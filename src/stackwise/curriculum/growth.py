"""From a rack to a larger one: modules are taken over, new ones start by `init`.

copy    the block it is made after: its neighbour's for append and prepend, the map's for duplicate.
zero    the same with its output projections at zero: under pre-norm the stack is the identity and the logits do not
        change by a single bit.
random  the start of `model.init`, keyed by the stack's name.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stackwise.curriculum.layout import Copies, lay_out
from stackwise.curriculum.stage import Growth
from stackwise.model.block import Block, Stack
from stackwise.model.block_spec import BlockSpec
from stackwise.model.init import Start, init_weights
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.precision.convert import dense_tensors


def grow(rack: Rack, growth: Growth, seed: int) -> tuple[Rack, Copies]:
    """The grown rack, which takes over the modules of the old one, and which new block copies which old one.

    The second is empty where `init` is not copy. What cannot grow so is a ValueError.
    """
    spec, sources = lay_out(rack.spec, growth)
    if growth.init == "random":
        return adopt(rack, spec, seed), {}
    for new, old in sources.items():
        if _shape(_block(spec, new)) != _shape(_block(rack.spec, old)):
            raise ValueError(
                f"{new.rstrip('.')} cannot start as a copy of {old.rstrip('.')}, whose shape is another; "
                "set new_stack_init to random"
            )
    if growth.init == "zero" and any(_block(spec, new).norm_placement != "pre" for new in sources):
        raise ValueError(
            "new_stack_init zero needs norm_placement pre: after a post-norm nothing is an identity"
        )
    grown = adopt(rack, spec, seed)
    copy_blocks(rack, grown, sources)
    if growth.init == "zero":
        held = {stack.uid for stack in rack.stacks}
        for stack in grown.stacks:
            if stack.uid not in held:
                zero_outputs(stack)
    return grown, sources if growth.init == "copy" else {}


def adopt(rack: Rack, spec: RackSpec, seed: int, own: dict[str, Stack] | None = None) -> Rack:
    """A rack of `spec` that takes over all modules of `rack` it has a place for.

    Stacks it lacks are taken from `own` as they are, or built and started at random.
    """
    held = {stack.uid: stack for stack in rack.stacks}
    added = dict(own or {})
    for i, stack_spec in enumerate(spec.stacks):
        if stack_spec.uid not in held and stack_spec.uid not in added:
            added[stack_spec.uid] = new = Stack.from_spec(stack_spec, i)
            init_weights(new, Start.of(spec, seed), prefix=f"stacks.{new.uid}.")
    # Beside parked stacks a new one waits in host memory until its stage places it.
    parked = any(block.parked is not None for block in rack.blocks())
    place = torch.device("cpu") if parked else rack.device
    stacks = [held[s.uid] if s.uid in held else added[s.uid].to(place) for s in spec.stacks]
    with torch.device("meta"):  # everything that is not a stack is taken over
        grown = Rack(spec, seed=seed, stacks=stacks)
    for name in ("embedding", "positions", "time", "tail", "norm"):
        setattr(grown, name, getattr(rack, name))
    grown.head = rack.head
    grown.runner = rack.runner
    return grown


@torch.no_grad()
def copy_blocks(old: Rack, new: Rack, sources: Copies) -> None:
    """Give the blocks of `new` the values of those of `old` they are made after.

    What adapters have learned is folded into the weights of the copy, as far as that can be (not bottlenecks).
    """
    values = {
        f"stacks.{stack.uid}.{name}": tensor
        for stack in old.stacks
        for name, tensor in plain_tensors(stack).items()
    }
    targets = new.state_dict()
    for target, source in sources.items():
        for name, tensor in targets.items():
            if name.startswith(target):
                tensor.copy_(values[source + name.removeprefix(target)])


def plain_tensors(stack: Stack) -> dict[str, Tensor]:
    """The tensors of the plain fp32 stack that computes what this one does: unpacked, adapters folded in."""
    tensors = dense_tensors(stack)
    if stack.adapters:
        from stackwise.adapters.merge import folded_weights

        tensors |= folded_weights(stack)
    return tensors


@torch.no_grad()
def zero_outputs(stack: Stack) -> None:
    """Make a pre-norm stack the identity."""
    for block in stack.blocks:
        assert isinstance(block, Block)
        for projection in block.output_projections():
            for parameter in projection.parameters():
                parameter.zero_()


def _block(spec: RackSpec, prefix: str) -> BlockSpec:
    _, uid, _, index, _ = prefix.split(".")
    return next(stack for stack in spec.stacks if stack.uid == uid).blocks[int(index)]


def _shape(block: BlockSpec) -> BlockSpec:
    """What must agree for one block's tensors to mean the same in another."""
    return replace(block, dropout=0.0, zero_init_outputs=False)
