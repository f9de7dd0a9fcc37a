"""Growth operators: from a rack to a larger one, on descriptions; weights are then loaded by name.

append, prepend   one more stack next to the head, or next to the embedding.
duplicate         the sequence of stacks repeated (G_stack: Du et al. 2024, arXiv 2405.15319), or any map from new
                  blocks to old ones: inserting copies of the middle stack (MIDAS: Saunshi et al. 2024, arXiv
                  2409.19044), or a stacking list of one's own.

A new stack starts by `init`:

copy    the block it is made after: its neighbour's for append and prepend, the map's for duplicate.
zero    the same with its output projections at zero: under pre-norm the stack is the identity and the logits do not
        change by a single bit.
random  the start of `model.init`, keyed by the stack's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from stackwise.curriculum.stage import INITS, OPS, Growth
from stackwise.model.block import Block, Stack
from stackwise.model.init import Start, init_weights
from stackwise.model.rack import Rack
from stackwise.model.spec import BlockSpec, RackSpec, StackSpec

Copies = dict[str, str]
"""Name prefix of a new block -> that of the block it is made after: {'stacks.s1.blocks.0.': 'stacks.s0.blocks.0.'}."""


def grow_spec(spec: RackSpec, growth: Growth) -> RackSpec:
    """The description of the grown rack. What cannot grow so is a ValueError."""
    return _lay_out(spec, growth)[0]


def grow(rack: Rack, growth: Growth, seed: int) -> tuple[Rack, Copies]:
    """The grown rack, which takes over the modules of the old one, and which new block copies which old one.

    The second is empty where `init` is not copy. What cannot grow so is a ValueError.
    """
    spec, sources = _lay_out(rack.spec, growth)
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


def new_stack(known: Iterable[StackSpec], blocks: tuple[BlockSpec, ...]) -> StackSpec:
    """A description with an identity that none of the known stacks has or had."""
    known = list(known)
    index = max((stack.build_index for stack in known), default=-1) + 1
    number, taken = index, {stack.uid for stack in known}
    while f"s{number}" in taken:  # stacks of one's own may be numbered otherwise
        number += 1
    return StackSpec(f"s{number}", blocks, index)


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
    stacks = [held[s.uid] if s.uid in held else added[s.uid].to(rack.device) for s in spec.stacks]
    with torch.device("meta"):  # everything that is not a stack is taken over
        grown = Rack(spec, seed=seed, stacks=stacks)
    for name in ("embedding", "positions", "tail", "norm"):
        setattr(grown, name, getattr(rack, name))
    grown.head = rack.head
    grown.runner = rack.runner
    return grown


@torch.no_grad()
def copy_blocks(old: Rack, new: Rack, sources: Copies) -> None:
    """Give the blocks of `new` the values of those of `old` they are made after."""
    values, targets = old.state_dict(), new.state_dict()
    for target, source in sources.items():
        for name, tensor in targets.items():
            if name.startswith(target):
                tensor.copy_(values[source + name.removeprefix(target)])


@torch.no_grad()
def zero_outputs(stack: Stack) -> None:
    """Make a pre-norm stack the identity."""
    for block in stack.blocks:
        assert isinstance(block, Block)
        for projection in block.output_projections():
            for parameter in projection.parameters():
                parameter.zero_()


def _lay_out(spec: RackSpec, growth: Growth) -> tuple[RackSpec, Copies]:
    if growth.op not in OPS:
        raise ValueError(f"growth must be one of {', '.join(OPS)}, got {growth.op!r}")
    if growth.init not in INITS:
        raise ValueError(f"new_stack_init must be one of {', '.join(INITS)}, got {growth.init!r}")
    return _duplicated(spec, growth) if growth.op == "duplicate" else _extended(spec, growth)


def _extended(spec: RackSpec, growth: Growth) -> tuple[RackSpec, Copies]:
    """One more stack at an end, made after its neighbour, the nearest trained one."""
    left = growth.op == "prepend"
    neighbour = spec.stacks[0 if left else -1]
    if growth.n_blocks < 1 and not growth.blocks:
        raise ValueError(f"n_blocks must be at least 1, got {growth.n_blocks}")
    size = len(neighbour.blocks)
    blocks = growth.blocks or tuple(neighbour.blocks[i % size] for i in range(growth.n_blocks))
    new = new_stack(spec.stacks, blocks)
    grown = spec.with_stacks([new, *spec.stacks] if left else [*spec.stacks, new])
    return grown, {_prefix(new.uid, i): _prefix(neighbour.uid, i % size) for i in range(len(blocks))}


def _duplicated(spec: RackSpec, growth: Growth) -> tuple[RackSpec, Copies]:
    """Stacks of blocks as the map lists them. A stack that reappears whole keeps its place in the first copy."""
    blocks = [(stack.uid, i, block) for stack in spec.stacks for i, block in enumerate(stack.blocks)]
    layers = growth.layers if growth.layers is not None else tuple(range(len(blocks))) * growth.factor
    if wrong := sorted({i for i in layers if not 0 <= i < len(blocks)}):
        raise ValueError(f"the map names the blocks {wrong}, but the rack has blocks 0 to {len(blocks) - 1}")
    runs: dict[int, tuple[StackSpec, tuple[int, ...]]] = {}
    at = 0
    for stack in spec.stacks:
        runs[at] = (stack, tuple(range(at, at + len(stack.blocks))))
        at += len(stack.blocks)
    kept: set[str] = set()
    places: list[StackSpec | tuple[int, ...]] = []  # a stack that stays, or the old blocks of a new one
    at = 0
    while at < len(layers):
        held, run = runs.get(layers[at], (None, ()))
        if held is not None and layers[at : at + len(run)] == run:
            places.append(run if held.uid in kept else held)
            kept.add(held.uid)
        else:
            run = layers[at : at + (growth.n_blocks or len(spec.stacks[0].blocks))]
            places.append(run)
        at += len(run)
    stacks: list[StackSpec] = []
    sources: Copies = {}
    for place in places:
        if isinstance(place, StackSpec):
            stacks.append(place)
            continue
        new = new_stack([*spec.stacks, *stacks], tuple(blocks[i][2] for i in place))
        sources.update({_prefix(new.uid, j): _prefix(*blocks[i][:2]) for j, i in enumerate(place)})
        stacks.append(new)
    return spec.with_stacks(stacks), sources


def _prefix(uid: str, block: int) -> str:
    return f"stacks.{uid}.blocks.{block}."


def _block(spec: RackSpec, prefix: str) -> BlockSpec:
    _, uid, _, index, _ = prefix.split(".")
    return next(stack for stack in spec.stacks if stack.uid == uid).blocks[int(index)]


def _shape(block: BlockSpec) -> BlockSpec:
    """What must agree for one block's tensors to mean the same in another."""
    return replace(block, dropout=0.0, zero_init_outputs=False)
