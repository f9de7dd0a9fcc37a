"""What trains, and what follows from it: prefix | active | suffix.

The trunk is derived, never configured. Forward order decides: units before the first trainable one are the prefix and
run without gradient in eval mode; frozen units behind it are the suffix, through which gradients flow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stackwise.curriculum.stage import Stage
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.model.rack import Rack


def trained_units(spec: RackSpec, stage: Stage) -> set[str]:
    """Names of the units a stage trains, from its selectors. One that matches nothing is a ValueError."""
    stacks = [f"stack:{stack.uid}" for stack in spec.stacks]
    newest = max(spec.stacks, key=lambda stack: stack.build_index)
    table: dict[str, list[str]] = {
        "all": ["embedding", *stacks, "tail", "norm", "head"],
        "new": [f"stack:{newest.uid}"],
        "trunk": [name for name in stacks if name != f"stack:{newest.uid}"],
        "embedding": ["embedding"],
        "tail": ["tail"],
        "norm": ["norm"],
        "head": ["head"],
        **{f"stack:{position}": [name] for position, name in enumerate(stacks)},
    }
    units: set[str] = set()
    for selector in stage.trains:
        if selector not in table:
            raise ValueError(
                f"stage {stage.name!r} trains {selector!r}, which matches nothing in a rack of {len(stacks)} stacks; "
                f"known selectors: {', '.join(table)}"
            )
        units.update(table[selector])
    if not spec.tail:
        units.discard("tail")
    if spec.tied and "head" in units and "embedding" not in units:
        units.discard("head")  # the head is the embedding's matrix, which stays fixed
    if not units:
        raise ValueError(f"stage {stage.name!r} trains nothing")
    return units


@dataclass(frozen=True)
class Split:
    """How a stage cuts the rack. `prefix` counts leading units (the embedding, then blocks) without gradient."""

    prefix: int
    n_blocks: int

    @property
    def prefix_blocks(self) -> int:
        """Blocks that run without gradient."""
        return max(0, self.prefix - 1)


def split_of(rack: Rack) -> Split:
    """Derive the split from the parameters that train now."""
    units = rack.units()
    prefix = 0
    for _, modules in units[:-2]:  # the final norm and the head are always on the gradient's side
        if any(p.requires_grad for module in modules for p in module.parameters()):
            break
        prefix += 1
    return Split(prefix, len(units) - 3)


def apply_training(rack: Rack, units: Iterable[str]) -> Split:
    """Thaw the named units and freeze the rest (eval mode, no gradient, gradients dropped); returns the split."""
    wanted = set(units)
    for name, modules in rack.units():
        trains = name in wanted
        for module in modules:
            module.requires_grad_(trains)
            module.train(trains)
            if not trains:
                for parameter in module.parameters():
                    parameter.grad = None
    for stack in rack.stacks:
        stack.training = f"stack:{stack.uid}" in wanted
    rack.training = True
    if rack.dropout is not None:
        rack.dropout.train("embedding" in wanted)
    return split_of(rack)
