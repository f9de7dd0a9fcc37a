"""PrecisionManager: the precision of single stacks, under one's own hand."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from functools import lru_cache

import torch

from stackwise.model.block import Stack
from stackwise.model.modes import autocast_to
from stackwise.precision.convert import freeze_stack, restore_full_precision
from stackwise.precision.modes import Mode, check_compute, mode_of


@lru_cache(maxsize=1)
def note_qlora() -> None:
    """Say once what the mode qlora is."""
    warnings.warn(
        "precision qlora is shorthand for bfloat16 over a base stored as nf4 that stays as it is, with an adapter set "
        "'stack' that trains",
        stacklevel=3,
    )


class PrecisionManager:
    """Sets the precision of stacks. `device`: the kind they will compute on; null: cuda where there is one, else cpu."""

    def __init__(self, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def set_stack_precision(self, stack: Stack, mode: str) -> Mode:
        """Let the stack compute in a mode; what no longer trains is stored in the mode's format at once.

        A stack of which something trains keeps its fp32 weights; when it is done, `freeze` stores it. qlora stores the
        base now, and `add_lora` then gives it what trains. An unknown mode is a ValueError that lists the modes, half
        on a CPU one with the reason, and so is another format for a stack that is stored already.
        """
        chosen = mode_of(mode)
        check_compute(chosen, self.device)
        if chosen.adapters:
            note_qlora()
        if chosen.adapters or not any(parameter.requires_grad for parameter in stack.parameters()):
            freeze_stack(stack, chosen.weight_format)
        stack.compute_dtype = chosen.compute_dtype
        return chosen

    def freeze(self, stack: Stack, mode: str) -> None:
        """Freeze the stack and store it in the format of a mode."""
        freeze_stack(stack, mode_of(mode).weight_format)

    def to_half(self, stack: Stack) -> None:
        """Freeze the stack and store it as fp16. It goes on computing as before, on any device."""
        freeze_stack(stack, "fp16")

    def to_full(self, stack: Stack) -> None:
        """Make the stack's layers fp32 again, with the values as they are stored, and compute in fp32."""
        restore_full_precision(stack)
        stack.compute_dtype = "float32"

    def autocast(self, mode: str) -> AbstractContextManager[None]:
        """Compute in a mode inside this context."""
        chosen = mode_of(mode)
        check_compute(chosen, self.device)
        return autocast_to(chosen.compute_dtype, torch.device(self.device))
