"""Running parked blocks: their tensors are copied to the device block by block, ahead of use.

    without gradient    block i runs on one buffer while block i + 1 is copied into the other
    with gradient       the forward pass keeps only the block's input; the backward pass copies the tensors again, runs
                        the block again and takes the gradients of its input and of what trains in it

So the device never holds more than the tensors of two blocks, the gradients of one and what autograd keeps inside one
(layer-to-layer execution: Pudipeddi et al. 2020, arXiv 2002.05645). Gradients of parked parameters are added to their
`.grad` in host memory; moments live where the parameters do, and so the ordinary optimizer updates there (ZeRO-Offload:
Ren et al. 2021, arXiv 2101.06840). Numbers are those of a resident run with recomputation, bit for bit.

`Streamer` is a runner of the rack (`Rack.runner`). Blocks that are not parked are left to another runner, or, with
`recompute_all`, computed again in the same way, so that their bytes can be counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from stackwise.model.block import Block, Context
from stackwise.model.cache import BlockCache
from stackwise.model.rack import Runner, run_block
from stackwise.trunk.gradients import HostGradients
from stackwise.trunk.lanes import Lane, Mark, host_like, lane_to
from stackwise.trunk.ledger import Held, Ledger
from stackwise.trunk.parking import parked_blocks, tensors_of
from stackwise.trunk.replay import Conditions, without_cache
from stackwise.trunk.slots import Live, Slots


class Streamer:
    """Runs the blocks of a rack, the parked ones on copies of their tensors.

    Make a new one after parking or unparking. `park_boundaries`: between forward and backward the inputs of parked
    blocks wait in host memory, so that they take no more room on the device as blocks are added. A key-value cache can
    be used without gradients only: ValueError.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        *,
        rest: Runner = run_block,
        park_boundaries: bool = True,
        recompute_all: bool = False,
        ledger: Ledger | None = None,
        lanes: tuple[Lane, Lane] | None = None,
    ) -> None:
        """`blocks` in forward order, as `Rack.blocks` gives them. `lanes` to the device and back: for tests."""
        self.blocks, self.device, self.rest = list(blocks), device, rest
        self.park_boundaries, self.recompute_all = park_boundaries, recompute_all
        self.ledger = ledger or Ledger()
        self.up, self.down = lanes or (lane_to(device), lane_to(device))
        parked = parked_blocks(self.blocks)
        self.slots = Slots(parked, device, self.up, self.ledger) if parked else None
        self.gradients = HostGradients(self.down, self.ledger)
        self._ahead: int | None = None
        """The ticket of the block that is being copied for the next call of this pass."""
        self._visit: _Visit | None = None
        """The last block of this pass that will be run again."""
        self._output: weakref.ref[Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Streamer:
        return self  # it belongs to no rack: blocks come with each call

    def __call__(
        self, index: int, block: Block, x_BTD: Tensor, context: Context, cache: BlockCache | None
    ) -> Tensor:
        if self._output is None or self._output() is not x_BTD:
            self._begin_pass()
        told = _norms_told(context)
        has_gradient = _has_gradient(block, x_BTD, told)
        if block.parked is None and not (self.recompute_all and has_gradient):
            y_BTD = self.rest(index, block, x_BTD, context, cache)
        elif not has_gradient:
            y_BTD, _ = self._run(index, block, x_BTD, context, cache)
        elif cache is not None:
            raise ValueError(
                "a key-value cache and gradients through a streamed block do not go together; use no_grad"
            )
        else:
            self._visit = _Visit(self, index, block, context, x_BTD, self._visit)
            y_BTD = _Again.apply(self._visit, x_BTD, told, *self._visit.reached)
        self._output = weakref.ref(y_BTD)
        return y_BTD

    def _begin_pass(self) -> None:
        """The input is not what the last call gave: nothing that was begun before belongs to this pass."""
        self._ahead, self._visit = None, None
        if self.slots is not None:
            self.slots.abandon()
        self.gradients.settle()

    @torch.no_grad()
    def _run(
        self, index: int, block: Block, x_BTD: Tensor, context: Context, cache: BlockCache | None
    ) -> tuple[Tensor, int]:
        """Run a parked block forward while the next one is copied; the output and the ticket of the copy."""
        assert self.slots is not None
        ticket = self.fetch(block, self._ahead)
        live = self.slots.open(ticket)
        following = next((b for b in self.blocks[index + 1 :] if b.parked is not None), None)
        self._ahead = None if following is None else self.slots.start(following)
        with without_cache(x_BTD.device.type):
            output: Tensor = functional_call(block, live, (x_BTD, context, cache), tie_weights=False)
        self.slots.close(ticket)
        return output, ticket

    def fetch(self, block: Block, ticket: int | None) -> int:
        """The ticket, if the buffers hold the block under it, else that of a new copy."""
        assert self.slots is not None
        return ticket if ticket is not None and self.slots.holds(ticket, block) else self.slots.start(block)


class _Visit:
    """One run of a block that will be run again in the backward pass. `before`: the one to come after it then."""

    def __init__(
        self,
        streamer: Streamer,
        index: int,
        block: Block,
        context: Context,
        x_BTD: Tensor,
        before: _Visit | None,
    ) -> None:
        self.streamer, self.before = streamer, before
        self.index, self.block, self.context = index, block, context
        self.parked = block.parked is not None
        self.trained = {name: tensor for name, tensor in tensors_of(block) if tensor.requires_grad}
        # A graph that reached parked parameters would call their hooks, and with no gradient: those go another way.
        self.reached = [torch.empty(0, requires_grad=True)] if self.parked else list(self.trained.values())
        self.conditions = Conditions(block, x_BTD)
        self.ticket: int | None = None
        self.boundary = _Boundary(streamer, x_BTD) if self.parked and streamer.park_boundaries else None

    def first(self, x_BTD: Tensor) -> Tensor:
        """The forward pass, without gradient."""
        if not self.parked:
            output: Tensor = self.block(x_BTD, self.context)
            return output
        output, self.ticket = self.streamer._run(self.index, self.block, x_BTD, self.context, None)
        return output

    def prepare(self) -> None:
        """Begin to copy what `again` will need, as far as there is room for it."""
        slots = self.streamer.slots
        if self.parked and slots is not None and (slots.idle or slots.holds(self.ticket, self.block)):
            self.ticket = self.streamer.fetch(self.block, self.ticket)
        if self.boundary is not None:
            self.boundary.fetch()

    def again(
        self, x_BTD: Tensor | None, grad_BTD: Tensor, needs_x: bool, needs_told: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the input, of scales and shifts of the time, and of what is reached; those of parked
        parameters go to the host by themselves."""
        streamer = self.streamer
        if streamer._visit is self:
            streamer._visit = None
        self.prepare()
        held = None if self.boundary is None else self.boundary.take()
        given = held.tensor if held is not None else x_BTD
        assert given is not None
        x_BTD = given.detach().requires_grad_(needs_x)
        live: Live = {}
        leaves = list(self.trained.values())
        slots, ticket = streamer.slots, self.ticket
        if slots is not None and ticket is not None:
            live = dict(slots.open(ticket))
            leaves = [live[name].detach().requires_grad_() for name in self.trained]
            live.update(zip(self.trained, leaves, strict=True))
        if self.before is not None:
            self.before.prepare()
            self.before = None
        context, told = self.context, None
        if needs_told and context.time is not None and context.time.norms is not None:
            told = context.time.norms.detach().requires_grad_()
            context = context._replace(time=context.time._replace(norms=told))
        with self.conditions.again(), torch.enable_grad():
            y_BTD = functional_call(self.block, live, (x_BTD, context), tie_weights=False)
        streamer.gradients.settle()
        wanted = [*([x_BTD] if needs_x else []), *([told] if told is not None else []), *leaves]
        found: list[Tensor | None] = list(torch.autograd.grad(y_BTD, wanted, grad_BTD, allow_unused=True))
        grad_x = found.pop(0) if needs_x else None
        grad_told = found.pop(0) if told is not None else None
        if slots is None or ticket is None:
            return grad_x, grad_told, *found
        slots.close(ticket)
        others = [grad for grad in (grad_BTD, grad_x, grad_told) if grad is not None]
        streamer.gradients.send(list(self.trained.values()), found, others)
        return grad_x, grad_told, None


class _Boundary:
    """The input of a block, which waits in host memory for the backward pass."""

    def __init__(self, streamer: Streamer, x_BTD: Tensor) -> None:
        self.streamer = streamer
        host = host_like(x_BTD, streamer.up.pins)
        self.host: Held | None = Held(streamer.ledger, "host.boundaries", host)
        streamer.down.uses(x_BTD)
        x_BTD = x_BTD.detach()
        self.written = streamer.down.run(lambda: host.copy_(x_BTD, non_blocking=True), streamer.down.mark())
        self.back: tuple[Held, Mark] | None = None

    def fetch(self) -> None:
        """Begin to copy it back to the device."""
        if self.back is not None:
            return
        if self.host is None:
            raise RuntimeError(
                "streamed blocks let go of their inputs in the first backward pass and cannot run a second one; "
                "compute the loss again, or keep the stacks resident"
            )
        up, host = self.streamer.up, self.host.tensor
        device = torch.empty_like(host, device=self.streamer.device)
        held = Held(self.streamer.ledger, "activations", device)
        mark = up.run(lambda: device.copy_(host, non_blocking=True), self.written, up.mark())
        self.back = held, mark

    def take(self) -> Held:
        """Its copy on the device, for good."""
        assert self.back is not None
        held, mark = self.back
        self.streamer.up.wait(mark)
        self.host = self.back = None
        return held


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, visit: _Visit, x_BTD: Tensor, told: Tensor | None, *reached: Tensor) -> Tensor:
        ctx.visit = visit
        if visit.boundary is None:
            ctx.save_for_backward(x_BTD)
        return visit.first(x_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        visit: _Visit = ctx.visit
        x_BTD = None if visit.boundary is not None else ctx.saved_tensors[0]
        _, needs_x, needs_told, *_ = ctx.needs_input_grad
        return None, *visit.again(x_BTD, grad_BTD, needs_x, needs_told)


def _norms_told(context: Context) -> Tensor | None:
    """Scales and shifts of the time, which gradients may pass as they pass the block's input."""
    return None if context.time is None else context.time.norms


def _has_gradient(block: Block, x_BTD: Tensor, told: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x_BTD.requires_grad
        or (told is not None and told.requires_grad)
        or any(p.requires_grad for p in block.parameters())
    )
