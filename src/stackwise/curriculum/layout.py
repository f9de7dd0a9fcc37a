"""What grown racks look like: growth on descriptions, without torch.

append, prepend   one more stack next to the head, or next to the embedding.
duplicate         the sequence of stacks repeated (G_stack: Du et al. 2024, arXiv 2405.15319), or any map from new
                  blocks to old ones: inserting copies of the middle stack (MIDAS: Saunshi et al. 2024, arXiv
                  2409.19044), or a stacking list of one's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from stackwise.curriculum.stage import INITS, OPS, Growth
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec, StackSpec

Copies = dict[str, str]
"""Name prefix of a new block -> that of the block it is made after: {'stacks.s1.blocks.0.': 'stacks.s0.blocks.0.'}."""


def grow_spec(spec: RackSpec, growth: Growth) -> RackSpec:
    """The description of the grown rack. What cannot grow so is a ValueError."""
    return lay_out(spec, growth)[0]


def lay_out(spec: RackSpec, growth: Growth) -> tuple[RackSpec, Copies]:
    """The grown rack, and after which old block each new one is made. What cannot grow so is a ValueError."""
    if growth.op not in OPS:
        raise ValueError(f"growth must be one of {', '.join(OPS)}, got {growth.op!r}")
    if growth.init not in INITS:
        raise ValueError(f"new_stack_init must be one of {', '.join(INITS)}, got {growth.init!r}")
    return _duplicated(spec, growth) if growth.op == "duplicate" else _extended(spec, growth)


def new_stack(known: Iterable[StackSpec], blocks: tuple[BlockSpec, ...]) -> StackSpec:
    """A description with an identity that none of the known stacks has or had."""
    known = list(known)
    index = max((stack.build_index for stack in known), default=-1) + 1
    number, taken = index, {stack.uid for stack in known}
    while f"s{number}" in taken:  # stacks of one's own may be numbered otherwise
        number += 1
    return StackSpec(f"s{number}", blocks, index)


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
