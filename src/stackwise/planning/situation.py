"""What the memory of a training step depends on, and the smaller rack that shows the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from stackwise.model.flops import Work, rows_of
from stackwise.model.spec import RackSpec, StackSpec
from stackwise.training.settings import OptimizerSettings

KEPT = 3
"""Blocks kept of a run of equal ones: the first, one for all between, and the last."""


@dataclass(frozen=True)
class Situation:
    """A training step, described. Bytes and FLOPs are functions of it alone.

    `units`: what trains. `edges`: rows hold document edges or padding, so attention needs a mask. `micro_batches`: 1,
    or 2 for two and more, which take the same memory. `kind`: cpu, or a kind of accelerator. `loss_rows`: positions
    per chunk of logits, null by the device. `frozen`, `trained`: where blocks live (`trunk.residency`). `optimizer`:
    the settings of `training.optimizer`, as JSON. `rounding`: the format that stacks without one of their own are
    rounded to while they train. `scored`: share of the positions that the head reads, below 1 those of an objective
    that hides tokens. `held`: how many blocks, the first in forward order, are held to consistency with those behind
    them (`training.consistency`); 0: none.
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
    rounding: str | None = None
    optimizer: str = "{}"
    loss_rows: int | None = None
    alone: int | None = None
    scored: float = 1.0
    held: int = 0

    @cached_property
    def settings(self) -> OptimizerSettings:
        """`training.optimizer`."""
        return OptimizerSettings.model_validate_json(self.optimizer)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch_size * self.seq_len

    def works(self) -> list[Work]:
        """What happens to each block of the whole rack, in forward order."""
        return list(rows_of(self.spec, self.units))


class Run(NamedTuple):
    """Equal blocks in a row: what happens to each, their stack without name and blocks (null in the tail), whether
    they run at all, whether they are held to consistency, how many of them are kept."""

    work: Work
    stack: StackSpec | None
    runs: bool
    held: bool = False
    kept: int = 0


def shortened(situation: Situation) -> tuple[Situation, list[int]]:
    """The same step on a rack that keeps KEPT blocks of every run of equal ones; and for each block that is left, in
    forward order, how many it stands for.

    Stacks are cut anew along the runs, so that steps which take the same memory become equal.
    """
    runs: list[Run] = []
    counts: list[int] = []
    for run, alike in groupby(_kinds(situation)):
        length = len(list(alike))
        runs.append(run._replace(kept=min(length, KEPT)))
        counts += [1, length - 2, 1] if length > KEPT else [1] * length
    spec = replace(situation.spec, stacks=(), tail=(), planned_blocks=0)
    units, alone = {unit for unit in situation.units if ":" not in unit}, None
    seen: set[str] = set()
    for _, group in groupby(enumerate(runs), key=lambda pair: _stack_key(situation, *pair)):
        members = [run for _, run in group]
        first, index = members[0], len(spec.stacks)
        blocks = tuple(run.work.spec for run in members for _ in range(run.kept))
        if first.stack is None:
            spec = replace(spec, tail=spec.tail + blocks)
            continue
        own_io = first.stack.own_io and first.stack.uid not in seen  # once, however the stack is cut
        seen.add(first.stack.uid)
        stack = replace(first.stack, uid=f"s{index}", build_index=index, blocks=blocks, own_io=own_io)
        spec = spec.with_stacks([*spec.stacks, stack])
        units |= {f"stack:s{index}"} if first.work.trains else set()
        units |= {f"lora.{name}:s{index}" for name in first.work.learning}
        units |= {f"io:s{index}"} if f"io:{first.stack.uid}" in situation.units else set()
        alone = index if situation.alone is not None and first.runs else alone
    held = sum(run.kept for run in runs if run.held)
    return replace(situation, spec=spec, units=frozenset(units), alone=alone, held=held), counts


def _kinds(situation: Situation) -> Iterator[Run]:
    """Every block of the whole rack, as a run of its own."""
    works = enumerate(situation.works())
    for stack in situation.spec.stacks:
        # one with an embedding of its own stands for no other
        bare = replace(stack, uid=stack.uid if stack.own_io else "", blocks=(), build_index=0)
        for _ in stack.blocks:
            at, work = next(works)
            yield Run(work, bare, situation.alone in (None, stack.build_index), at < situation.held)
    for _, work in works:
        yield Run(work, None, True)


def _stack_key(situation: Situation, index: int, run: Run) -> object:
    """Runs with one key become one stack: each its own, but a stack that runs alone stays whole."""
    if run.stack is None:
        return "tail"
    return "alone" if situation.alone is not None and run.runs else index
