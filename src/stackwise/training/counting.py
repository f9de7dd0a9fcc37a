"""Counted bytes: what a training step really holds, tensor by tensor.

On the device: parameters (buffers of modules included), gradients, moments, activations (what autograd has saved, and
the inputs and insides of blocks that are computed again), and the working buffers of streamed blocks. In host memory:
whatever of it is parked there. A CPU that trains has one memory for both; there the books tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.model.rack import Rack, recompute_block, run_block
from stackwise.training.optim import Optimizers
from stackwise.trunk.ledger import Held, Ledger, storage_key
from stackwise.trunk.parking import Parked, tensor_bytes, tensors_of
from stackwise.trunk.streaming import Streamer


class StepBytes:
    """Counts one training step: `counting` around its forward and backward passes, then `result` before zero_grad."""

    def __init__(self, rack: Rack) -> None:
        self._rack = rack
        runner = rack.runner
        self._streamer = runner if isinstance(runner, Streamer) else None
        self.ledger = self._streamer.ledger if self._streamer else Ledger()
        self._skip = {storage_key(tensor) for _, tensor in tensors_of(rack)}
        self._allocated: int | None = None

    @contextmanager
    def counting(self) -> Iterator[StepBytes]:
        """Follow what comes and goes inside. Counting costs time, and changes no number."""
        self.ledger.restart()
        on_cuda = self._rack.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self._rack.device)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        with self._counted_runner(), self._counted_gradients(), hooks:
            yield self
        if on_cuda:
            self._allocated = torch.cuda.max_memory_allocated(self._rack.device)

    def _pack(self, tensor: Tensor) -> Tensor | Held:
        key = storage_key(tensor)
        slots = self._streamer.slots if self._streamer else None
        if key in self._skip or (slots is not None and slots.owns(key)):
            return tensor
        return Held(self.ledger, "activations", tensor)

    @contextmanager
    def _counted_runner(self) -> Iterator[None]:
        """PyTorch's checkpoint hides what it computes again; for this step ours takes its place, number for number."""
        rack, runner = self._rack, self._rack.runner
        if isinstance(runner, Streamer):
            runner.recompute_all = runner.rest is recompute_block
        elif runner is recompute_block:
            rack.runner = Streamer(
                rack.blocks(), rack.device, rest=run_block, recompute_all=True, ledger=self.ledger
            )
        try:
            yield
        finally:
            rack.runner = runner
            if isinstance(runner, Streamer):
                runner.recompute_all = False

    @contextmanager
    def _counted_gradients(self) -> Iterator[None]:
        """Gradients of parameters on the device; a parked block's come through the streamer's ledger."""
        held: dict[Tensor, int] = {}

        def came(parameter: Tensor) -> None:
            for other in [p for p in held if p.grad is None]:  # an optimizer has used it up
                self.ledger.add("gradients", -held.pop(other))
            if parameter not in held:
                held[parameter] = parameter.nbytes if parameter.grad is None else parameter.grad.nbytes
                self.ledger.add("gradients", held[parameter])

        parked = set(_parked_parameters(self._rack).values())
        here = [p for p in self._rack.parameters() if p.requires_grad and p not in parked]
        handles = [p.register_post_accumulate_grad_hook(came) for p in here]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for n_bytes in held.values():
                self.ledger.add("gradients", -n_bytes)

    def result(self, optimizers: Optimizers) -> dict[str, Any]:
        """Bytes by item, each at its most.

        `total` is their sum. `peak` is the most held at once: weights and moments, which are always there, and the
        most that gradients, activations and buffers took together. `host` has the bytes off the device: parameters in
        main memory, those `mapped` from files, gradients, moments and boundaries. `allocated`: the peak of CUDA's
        allocator, the step and everything beside it; null elsewhere.
        """
        most = self.ledger.most
        weights, host_weights, mapped = self._weights()
        moments, host_moments, visiting = self._moments(optimizers)
        items = {
            "parameters": weights,
            "gradients": most.get("gradients", 0),
            "moments": moments + visiting,
            "activations": most.get("activations", 0),
            "buffers": most.get("buffers", 0),
        }
        parked = _parked_parameters(self._rack).values()
        host = {
            "parameters": host_weights,
            "mapped": mapped,
            "gradients": sum(p.grad.nbytes for p in parked if p.grad is not None),
            "moments": host_moments,
            "boundaries": most.get("host.boundaries", 0),
        }
        return {
            **items,
            "total": sum(items.values()),
            "peak": weights + moments + max(self.ledger.peak, visiting),
            "host": host,
            "allocated": self._allocated,
        }

    def _weights(self) -> tuple[int, int, int]:
        """Bytes on the device, in host memory, and mapped from files."""
        everything, parked, mapped = tensor_bytes(self._rack), 0, 0
        for block in self._rack.blocks():
            if isinstance(block.parked, Parked):
                size = tensor_bytes(block)
                in_file = sum(t.nbytes for n, t in tensors_of(block) if n in block.parked.mapped)
                everything, parked, mapped = everything - size, parked + size - in_file, mapped + in_file
        return everything, parked, mapped

    def _moments(self, optimizers: Optimizers) -> tuple[int, int, int]:
        """Bytes on the device, in host memory, and of those that visit the device for their parameter's step."""
        parked = _parked_parameters(self._rack)
        on_host = optimizers.host_bytes() > 0
        here = there = visiting = 0
        for name, held in optimizers.state().items():
            if name in parked:
                there += sum(tensor.nbytes for tensor in held.values())
                continue
            away = sum(t.nbytes for t in held.values() if t.dim() > 0) if on_host else 0
            here += sum(tensor.nbytes for tensor in held.values()) - away
            there, visiting = there + away, max(visiting, away)
        return here, there, visiting


def _unpack(packed: Tensor | Held) -> Tensor:
    return packed.tensor if isinstance(packed, Held) else packed


def _parked_parameters(rack: Rack) -> dict[str, nn.Parameter]:
    """Parameters of parked blocks by name."""
    parked = {id(p) for block in rack.blocks() if block.parked is not None for p in block.parameters()}
    return {name: p for name, p in rack.named_parameters() if id(p) in parked}
