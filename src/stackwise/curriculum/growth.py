"""Growth operators: from a rack to a larger one, on descriptions; weights are then loaded by name.

copy    the new stack starts as the newest trained stack.
zero    the same with its output projections at zero: under pre-norm the stack is the identity and the logits do not
        change by a single bit.
random  the start of `model.init`, keyed by the stack's name.
"""

from __future__ import annotations

import torch

from stackwise.curriculum.stage import INITS
from stackwise.model.block import Block, Stack
from stackwise.model.init import Start, init_weights
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec, StackSpec


def next_build_index(spec: RackSpec) -> int:
    return max((stack.build_index for stack in spec.stacks), default=-1) + 1


def append_spec(spec: RackSpec, n_blocks: int) -> RackSpec:
    """One more stack next to the head (before the tail), made of the newest stack's kind of block."""
    index = next_build_index(spec)
    newest = max(spec.stacks, key=lambda stack: stack.build_index)
    blocks = tuple(newest.blocks[i % len(newest.blocks)] for i in range(n_blocks))
    return spec.with_stacks([*spec.stacks, StackSpec(f"s{index}", blocks, index)])


def source_names(spec: RackSpec, uid: str) -> dict[str, str]:
    """For each block of the stack `uid`, the block prefix it is copied from: {'stacks.s1.blocks.0.': 'stacks.s0.blocks.0.'}."""
    ordered = sorted(spec.stacks, key=lambda stack: stack.build_index)
    index = next(i for i, stack in enumerate(ordered) if stack.uid == uid)
    if index == 0:
        return {}
    source, new = ordered[index - 1], ordered[index]
    return {
        f"stacks.{uid}.blocks.{i}.": f"stacks.{source.uid}.blocks.{i % len(source.blocks)}."
        for i in range(len(new.blocks))
    }


@torch.no_grad()
def start_stack(rack: Rack, uid: str, init: str, seed: int) -> None:
    """Give the stack `uid` of `rack` its first weights. An unknown `init`, or zero under post-norm: ValueError."""
    if init not in INITS:
        raise ValueError(f"new_stack_init must be one of {', '.join(INITS)}, got {init!r}")
    stack = next(s for s in rack.stacks if s.uid == uid)
    if init == "random":
        init_weights(stack, Start.of(rack.spec, seed), prefix=f"stacks.{uid}.")
        return
    tensors = rack.state_dict()
    for new, old in source_names(rack.spec, uid).items():
        for name in tensors:
            if name.startswith(new):
                tensors[name].copy_(tensors[old + name.removeprefix(new)])
    if init == "zero":
        zero_outputs(stack)


@torch.no_grad()
def zero_outputs(stack: Stack) -> None:
    """Make a pre-norm stack the identity."""
    for block in stack.blocks:
        assert isinstance(block, Block)
        if not block.pre:
            raise ValueError(
                "new_stack_init zero needs norm_placement pre: after a post-norm nothing is an identity"
            )
        for projection in block.output_projections():
            for parameter in projection.parameters():
                parameter.zero_()


def append_stack(rack: Rack, n_blocks: int, init: str, seed: int) -> Rack:
    """A larger rack with one more stack next to the head; the modules of the old one are taken over."""
    spec = append_spec(rack.spec, n_blocks)
    return adopt(rack, spec, init, seed)


def adopt(rack: Rack, spec: RackSpec, init: str, seed: int, own: dict[str, Stack] | None = None) -> Rack:
    """A rack of `spec` that takes over all modules of `rack`.

    Stacks it lacks are taken from `own` as they are, or built and started by `init`.
    """
    held = {stack.uid: stack for stack in rack.stacks} | (own or {})
    new = [s.uid for s in spec.stacks if s.uid not in held]
    stacks = [held.get(s.uid) or Stack.from_spec(s, i) for i, s in enumerate(spec.stacks)]
    grown = Rack(spec, seed=seed, stacks=[stack.to(rack.device) for stack in stacks])
    for name in ("embedding", "positions", "tail", "norm"):
        setattr(grown, name, getattr(rack, name))
    grown.head = rack.head
    grown.runner = rack.runner
    for uid in new:
        start_stack(grown, uid, init, seed)
    return grown
