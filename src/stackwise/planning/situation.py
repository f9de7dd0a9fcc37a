"""What the memory of a training step depends on, and the smaller rack that shows the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from stackwise.model.flops import Work, rows_of
from stackwise.model.spec import RackSpec

KEPT = 3
"""Blocks kept of a run of equal ones: the first, one for all between, and the last."""


@dataclass(frozen=True)
class Situation:
    """A training step, described. Bytes and FLOPs are functions of it alone.

    `units`: what trains. `edges`: rows hold document edges or padding, so attention needs a mask. `micro_batches`: 1,
    or 2 for two and more, which take the same memory. `kind`: cpu, or a kind of accelerator. `loss_rows`: positions
    per chunk of logits, null by the device. `frozen`, `trained`: where blocks live (`trunk.residency`). `optimizer`:
    the settings of `training.optimizer`, as JSON.
    """

    spec: RackSpec
    units: frozenset[str]
    batch_size: int
    seq_len: int
    kind: str = "cpu"
    dtype: str = "float32"
    micro_batches: int = 1
    edges: bool = False
    recompute: bool = False
    frozen: str = "resident"
    trained: str = "resident"
    optimizer: str = "{}"
    loss_rows: int | None = None
    alone: int | None = None

    @property
    def memory(self) -> str:
        """`training.optimizer.memory`."""
        return str(json.loads(self.optimizer).get("memory", "full"))

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch_size * self.seq_len

    def works(self) -> list[Work]:
        """What happens to each block of the whole rack, in forward order."""
        return list(rows_of(self.spec, self.units))


def shortened(situation: Situation) -> tuple[Situation, list[int]]:
    """The same step on a rack that keeps KEPT blocks of every run of equal ones; and for each block that is left, in
    forward order, how many it stands for."""
    places = _places(situation)
    kept: list[Place] = []
    counts: list[int] = []
    for _, group in groupby(places, key=lambda place: place.kind):
        run = list(group)
        if len(run) > KEPT:
            run, between = [run[0], run[1], run[-1]], len(run) - 2
            counts += [1, between, 1]
        else:
            counts += [1] * len(run)
        kept += run
    return _only(situation, kept), counts


class Place(NamedTuple):
    """A block: the uid of its stack ("" for the tail), where it is in it, and all that makes it equal to another."""

    uid: str
    at: int
    kind: tuple[Any, ...]


def _places(situation: Situation) -> list[Place]:
    spec, places, works = situation.spec, [], iter(situation.works())
    for stack in spec.stacks:
        runs = situation.alone in (None, stack.build_index)
        bare = replace(stack, uid="", blocks=(), build_index=0)
        places += [Place(stack.uid, i, (next(works), bare, runs)) for i in range(len(stack.blocks))]
    return places + [Place("", i, (next(works), None, True)) for i in range(len(spec.tail))]


def _only(situation: Situation, kept: list[Place]) -> Situation:
    """The situation on a rack of the kept blocks."""
    spec = situation.spec
    by_stack = {stack.uid: [place.at for place in kept if place.uid == stack.uid] for stack in spec.stacks}
    stacks = [
        replace(stack, blocks=tuple(stack.blocks[i] for i in by_stack[stack.uid]))
        for stack in spec.stacks
        if by_stack[stack.uid]
    ]
    tail = tuple(spec.tail[place.at] for place in kept if place.uid == "")
    planned = spec.planned_blocks or len(spec.blocks)
    small = replace(spec, stacks=tuple(stacks), tail=tail, planned_blocks=planned)
    return replace(situation, spec=small, units=frozenset(_renamed(situation.units, by_stack)))


def _renamed(units: frozenset[str], by_stack: dict[str, list[int]]) -> Iterator[str]:
    """Units of the blocks that are left, under the places they have now."""
    for unit in units:
        kind, _, rest = unit.partition(":")
        uid, _, index = rest.partition(".")
        if kind == "block":
            if int(index) in by_stack[uid]:
                yield f"block:{uid}.{by_stack[uid].index(int(index))}"
        elif not rest or by_stack[uid]:
            yield unit
