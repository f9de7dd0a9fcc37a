"""The part of ProgressiveRackBuilder that deals with the precision of single stacks."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stackwise.model.block import Stack
from stackwise.model.rack import Rack
from stackwise.model.spectral import fold_spectral_norm
from stackwise.precision.convert import dense_tensors, freeze_stack, restore_full_precision, stack_bytes
from stackwise.precision.manager import PrecisionManager
from stackwise.precision.modes import frozen_format, mode_of

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


class BuilderPrecision:
    """Modes of the stacks under construction (`precision.modes`), and what they are stored as once frozen."""

    config: StackWiseConfig
    default_precision: str
    _modes: dict[str, str]
    """Mode by uid, of stacks that have one of their own."""
    _full: dict[str, dict[str, Tensor]]
    """fp32 tensors by uid, of stacks that are stored in another format."""

    @abstractmethod
    def build_rack(self) -> Rack:
        """The current rack."""

    @abstractmethod
    def _note(self) -> None:
        """The rack's description says what its stacks are."""

    def _mode(self, precision: str | None) -> str | None:
        """The mode of a stack to come; null: it computes as the run does. An unknown mode: ValueError."""
        own = precision or self.config.training.progressive.new_stack_precision
        if own is None and self.default_precision != "full":
            own = self.default_precision
        return None if own is None else mode_of(own).name

    def _set_mode(self, stack: Stack, name: str | None) -> None:
        if name is None:
            return
        mode = PrecisionManager(self.build_rack().device.type).set_stack_precision(stack, name)
        stack.frozen_format = frozen_format(self.config.training.progressive, name)
        stack.adapters_only = mode.adapters
        self._modes[stack.uid] = name

    def _store(self, stack: Stack) -> None:
        """Store a stack that has just frozen in its format; the fp32 weights from before are kept in main memory."""
        if stack.spectral:
            fold_spectral_norm(stack)
            self._note()
        format = stack.frozen_format or frozen_format(self.config.training.progressive, None)
        if format == stack.weight_format or stack.weight_format != "fp32":
            return
        if self.config.checkpoint.full_precision_backup:
            self._full[stack.uid] = {n: t.detach().cpu().clone() for n, t in dense_tensors(stack).items()}
        freeze_stack(stack, format)
        self._note()

    def restore_full_precision(self, uid: str) -> None:
        """Put back the fp32 weights that a stack had before `freeze_trunk` stored it in another format.

        An unknown stack, or one whose weights were not kept (`checkpoint.full_precision_backup`): ValueError.
        """
        held = {stack.uid: stack for stack in self.build_rack().stacks}
        if uid not in held:
            raise ValueError(f"no stack is called {uid!r}; known: {', '.join(held)}")
        if held[uid].weight_format == "fp32":
            return
        if uid not in self._full:
            raise ValueError(
                f"the fp32 weights of stack {uid!r} were not kept: it was stored by another builder, or "
                "checkpoint.full_precision_backup is false"
            )
        restore_full_precision(held[uid], self._full.pop(uid))
        self._note()

    def _precision_info(self, stack: Stack) -> dict[str, Any]:
        return {
            "precision": self._modes.get(stack.uid, self.default_precision),
            "compute_dtype": stack.compute_dtype,
            "weight_format": stack.weight_format,
            "bytes": stack_bytes(stack),
        }
