"""Gradients of parked parameters: from the device, where they are made, to the host, where they are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stackwise.trunk.lanes import Lane, Mark, host_like
from stackwise.trunk.ledger import Held, Ledger, storage_key


class HostGradients:
    """Adds gradients to `.grad` of parameters in host memory, as autograd does for those on the device.

    They travel while the next block runs again. At most one block's are on the device.
    """

    def __init__(self, lane: Lane, ledger: Ledger) -> None:
        self._lane, self._ledger = lane, ledger
        self._coming: list[tuple[Tensor, Tensor]] = []
        self._on_device: list[Held] = []
        self._arrived: Mark = None

    def send(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], others: Sequence[Tensor]
    ) -> None:
        """Begin to move the gradients of parameters, which may share no memory with `others`."""
        given = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        self._on_device = [Held(self._ledger, "gradients", g) for _, g in given]
        copies: list[tuple[Tensor, Tensor]] = []
        seen = {storage_key(other) for other in others}
        for parameter, gradient in given:
            if gradient.device == parameter.device:  # a CPU trains: the memory itself goes over
                whole = gradient.is_contiguous() and gradient.untyped_storage().nbytes() == gradient.nbytes
                if not whole or storage_key(gradient) in seen:
                    gradient = gradient.clone(memory_format=torch.contiguous_format)
                seen.add(storage_key(gradient))
                self._coming.append((parameter, gradient))
            else:
                host = host_like(parameter, self._lane.pins)
                copies.append((host, gradient))
                self._coming.append((parameter, host))
        if copies:
            self._arrived = self._lane.run(
                lambda: [host.copy_(gradient, non_blocking=True) for host, gradient in copies],
                self._lane.mark(),
            )
        # also when the backward pass ends here
        torch.autograd.Variable._execution_engine.queue_callback(self.settle)

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for what is on its way and add it to `.grad`."""
        if not self._coming:
            return
        self._lane.settle(self._arrived)
        for parameter, gradient in self._coming:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(parameter)
        self._coming, self._on_device, self._arrived = [], [], None
