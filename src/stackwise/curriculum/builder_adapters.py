"""The part of ProgressiveRackBuilder that deals with adapters."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from stackwise.adapters.ranks import STACK, TRUNK, set_of
from stackwise.curriculum.split import apply_training
from stackwise.model.block import Stack
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


class BuilderAdapters:
    """Adapter sets of the stacks under construction. What their numbers do not say comes from the config."""

    config: StackWiseConfig

    @abstractmethod
    def build_rack(self) -> Rack:
        """The current rack."""

    @abstractmethod
    def _positions(self, given: int | Iterable[int] | slice | None) -> list[int]:
        """Positions as a sorted list; one outside the rack is an IndexError."""

    def add_lora(self, stack_idx: int, rank: int, alpha: float, name: str = STACK) -> None:
        """Add a named adapter set to the stack at a position; the output stays the same.

        Method, dropout, targets and rslora are those of `training.progressive.qlora_*`. rank < 1, or a set of this name
        that is there already: ValueError.
        """
        (position,) = self._positions(stack_idx)
        stack = self.build_rack().stacks[position]
        spec = set_of(self.config.training.progressive, STACK, stack.build_index, rank, alpha)
        self._attach(stack, replace(spec, name=name))

    def merge_lora(self, stack_idx: int | None = None, name: str | None = None) -> None:
        """Fold adapter sets into the weights for good; the output stays the same to rounding.

        Null: of all stacks, all sets. A frozen format becomes plain fp32. Nothing to merge, or a bottleneck: ValueError.
        """
        from stackwise.adapters.merge import check_fold, fold

        rack = self.build_rack()
        positions = self._positions(slice(None) if stack_idx is None else stack_idx)
        stacks = [stack for stack in (rack.stacks[i] for i in positions) if _names(stack, name)]
        if not stacks:
            wanted = "adapters" if name is None else f"adapter set {name!r}"
            where = "any stack" if stack_idx is None else f"stack {stack_idx}"
            raise ValueError(f"nothing to merge: no {wanted} on {where}")
        for stack in stacks:
            check_fold(stack, name)  # all of them before the first changes
        for stack in stacks:
            fold(stack, name)
        self._note()

    def freeze_all_but_qlora(self, stack_indices: int | Iterable[int] | slice | None = None) -> int:
        """Freeze everything but the adapters of the stacks at these positions (null: all); returns how many numbers train.

        A stack there without adapters: ValueError. A position outside the rack: IndexError.
        """
        rack = self.build_rack()
        chosen = [
            rack.stacks[i] for i in self._positions(slice(None) if stack_indices is None else stack_indices)
        ]
        if bare := [stack.stack_id for stack in chosen if not stack.adapters]:
            raise ValueError(
                f"no adapters on stack {', '.join(map(str, bare))}, so nothing there would train; call add_lora first, "
                "or set training.progressive.qlora_enabled"
            )
        if raw := [stack.stack_id for stack in chosen if not stack.trained]:
            warnings.warn(
                f"the adapters of stack {', '.join(map(str, raw))} sit on weights that no run has trained: adapters "
                "refine a trained model, they do not make one (arXiv 2403.03507, table 2)",
                stacklevel=2,
            )
        apply_training(rack, {f"lora.{spec.name}:{stack.uid}" for stack in chosen for spec in stack.adapters})
        return sum(parameter.numel() for parameter in rack.parameters() if parameter.requires_grad)

    def _planned_set(self, build_index: int, rank: int | None, alpha: float | None) -> AdapterSpec | None:
        """The set `stack` of a stack to come; null where it gets none."""
        progressive = self.config.training.progressive
        if not progressive.qlora_enabled and rank is None and alpha is None:
            return None
        return set_of(progressive, STACK, build_index, rank, alpha)

    def _adapt(self, new: Stack, planned: AdapterSpec | None) -> Stack:
        """Give a new stack its set, and the older ones theirs for its arrival."""
        progressive = self.config.training.progressive
        if planned is not None and STACK not in _names(new):
            self._attach(new, planned)
        if progressive.qlora_enabled and progressive.progressive_qlora:
            for stack in self.build_rack().stacks:
                if stack is new:
                    continue
                if TRUNK not in _names(stack):
                    self._attach(stack, set_of(progressive, TRUNK, stack.build_index))
                elif progressive.trunk_lora_mode == "merge":
                    from stackwise.adapters.merge import merge_and_requantise

                    count = len(self.build_rack().stacks)
                    merge_and_requantise(stack, TRUNK, self.config.training.seed, restart=count)
        return new

    def _attach(self, stack: Stack, spec: AdapterSpec) -> None:
        from stackwise.adapters.attach import attach

        attach(stack, spec, self.config.training.seed)
        self._note()

    def _note(self) -> None:
        """The rack's description says what its stacks carry."""
        rack = self.build_rack()
        rack.spec = rack.spec.with_stacks([stack.spec for stack in rack.stacks])


def _names(stack: Stack, name: str | None = None) -> list[str]:
    return [spec.name for spec in stack.adapters if name in (None, spec.name)]
