"""What trains, and what follows from it: prefix | active | suffix.

The trunk is derived, never configured. Forward order decides: units before the first trainable one are the prefix and
run without gradient in eval mode; frozen units behind it are the suffix, through which gradients flow.

Names of units: embedding, stack:<uid>, block:<uid>.<i>, lora.<set>:<uid>, io:<uid>, tail, norm, head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stackwise.config.errors import did_you_mean
from stackwise.curriculum.stage import Stage
from stackwise.model.spec import RackSpec, StackSpec

if TYPE_CHECKING:
    from torch import nn

    from stackwise.model.rack import Rack


def trained_units(spec: RackSpec, stage: Stage) -> set[str]:
    """Names of the units a stage trains, from its selectors. One that matches nothing is a ValueError."""
    table = selectors(spec)
    units: set[str] = set()
    for selector in stage.trains:
        if not table.get(selector):
            raise ValueError(
                f"stage {stage.name!r} trains {selector!r}, which {_matches_nothing(selector, spec)}"
            )
        units.update(table[selector])
    if spec.head_is_table and "head" in units and "embedding" not in units:
        units.discard("head")  # the head is the embedding's matrix, which stays fixed
    if not units:
        raise ValueError(f"stage {stage.name!r} trains nothing")
    return units


def selectors(spec: RackSpec) -> dict[str, list[str]]:
    """Every selector of a rack with the units it stands for: of a stack whose matrices never train, its adapters."""
    stacks = [_own_units(stack, f"stack:{stack.uid}") for stack in spec.stacks]
    newest = max(range(len(stacks)), key=lambda i: spec.stacks[i].build_index)
    tail = ["tail"] if spec.tail else []
    table = {
        "all": ["embedding", *stacks, *tail, "norm", "head"],
        "new": [stacks[newest]],
        "trunk": [name for i, name in enumerate(stacks) if i != newest],
        "embedding": ["embedding"],
        "tail": tail,
        "norm": ["norm"],
        "head": ["head"],
    }
    for position, stack in enumerate(spec.stacks):
        table[f"stack:{position}"] = [stacks[position]]
        table[f"io:{position}"] = [f"io:{stack.uid}"]
        for i in range(len(stack.blocks)):
            table[f"block:{position}.{i}"] = [_own_units(stack, f"block:{stack.uid}.{i}")]
        for adapter in stack.adapters:
            table.setdefault(f"lora:{adapter.name}", []).append(f"lora.{adapter.name}:{stack.uid}")
    return table


def _own_units(stack: StackSpec, name: str) -> str:
    return f"lora.stack:{stack.uid}" if stack.adapters_only else name


def _matches_nothing(selector: str, spec: RackSpec) -> str:
    known = [name for name, units in selectors(spec).items() if units]
    shown = [name for name in known if not name.startswith(("stack:", "block:", "io:"))]
    last, blocks = len(spec.stacks) - 1, ", ".join(str(len(stack.blocks)) for stack in spec.stacks)
    close = did_you_mean(selector, known)
    return (
        f"matches nothing in a rack of {len(spec.stacks)} stacks with {blocks} blocks; known: {', '.join(shown)}, "
        f"stack:0 to stack:{last}, block:<stack>.<block>, io:<stack>" + (f"; {close}" if close else "")
    )


def units_of(name: str, adapter_set: str | None = None) -> set[str]:
    """The units that a parameter belongs to, from its name in the rack; a unit that trains trains all of its own."""
    first, _, rest = name.partition(".")
    if first != "stacks":
        return {"embedding" if first in ("positions", "time") else first}
    uid, inside, i, *_ = rest.split(".")
    if inside == "io":
        return {f"io:{uid}"}
    return {f"stack:{uid}", f"block:{uid}.{i}"} | ({f"lora.{adapter_set}:{uid}"} if adapter_set else set())


@dataclass(frozen=True)
class Split:
    """How a stage cuts the rack.

    `prefix` counts leading units (the embedding, then blocks) without gradient. Blocks `start` up to `stop` (null: to
    the last) run behind them; the blocks before `start` are the prefix, or left out where a stack runs alone.
    """

    prefix: int
    n_blocks: int
    start: int = 0
    stop: int | None = None

    @property
    def prefix_blocks(self) -> int:
        """Blocks that run without gradient."""
        return max(0, self.prefix - 1)


def split_of(rack: Rack, alone: int | None = None) -> Split:
    """Derive the split from the parameters that train now. `alone`: build index of the only stack that runs."""
    rows = list(_rows(rack))
    count = len(rows) - 3
    if alone is not None:
        start = 0
        for stack in rack.stacks:
            stop = start + len(stack.blocks)
            if stack.build_index == alone:
                lookup: list[nn.Module] = rows[0][1] if stack.io is None else [stack.io]
                return Split(0 if _trains(lookup) else 1, count, start, stop)
            start = stop
        raise ValueError(f"no stack of the rack has the build index {alone}")
    prefix = 0
    for _, modules in rows[:-2]:  # the final norm and the head are always on the gradient's side
        if _trains(modules):
            break
        prefix += 1
    return Split(prefix, count, max(0, prefix - 1))


def apply_training(rack: Rack, units: Iterable[str], alone: int | None = None) -> Split:
    """Thaw the named units and freeze the rest (eval mode, no gradient, gradients dropped); returns the split.

    A stack that is stored in a frozen format and has no adapters cannot train: ValueError.
    """
    from stackwise.model.names import set_modules
    from stackwise.precision.convert import refuse_bare_training

    wanted = set(units)
    for stack in rack.stacks:
        if any(unit == f"stack:{stack.uid}" or unit.startswith(f"block:{stack.uid}.") for unit in wanted):
            refuse_bare_training(stack)
    for names, modules in _rows(rack):
        for module in modules:
            module.requires_grad_(not wanted.isdisjoint(names))
            module.train(not wanted.isdisjoint(names))
    for stack in rack.stacks:
        if stack.io is not None:
            stack.io.requires_grad_(f"io:{stack.uid}" in wanted)
            stack.io.train(f"io:{stack.uid}" in wanted)
        for adapter in stack.adapters:
            if f"lora.{adapter.name}:{stack.uid}" in wanted:
                for module in set_modules(stack, adapter.name):
                    module.requires_grad_(True)
                    module.train(True)
        stack.training = any(p.requires_grad for p in stack.parameters())
    for parameter in rack.parameters():
        if not parameter.requires_grad:
            parameter.grad = None
    rack.training = True
    if rack.dropout is not None:
        rack.dropout.train("embedding" in wanted or any(unit.startswith("io:") for unit in wanted))
    split = split_of(rack, alone)
    rack.span = (0, None) if alone is None else (split.start, split.stop)
    return split


def _rows(rack: Rack) -> Iterator[tuple[set[str], list[nn.Module]]]:
    """The rack in forward order, block by block: names of the units it belongs to, and its modules."""
    seen: dict[str, int] = {}
    for name, modules in rack.units():
        kind, _, uid = name.partition(":")
        if kind == "stack":
            i = seen[uid] = seen.get(uid, -1) + 1
            yield {name, f"block:{uid}.{i}"}, modules
        else:
            yield {name}, modules


def _trains(modules: list[nn.Module]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())
