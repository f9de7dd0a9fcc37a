"""One training step on tensors without storage: which bytes come and go, block by block.

The modules, the loss, the split, the residency and the counting are the loop's own. Blocks that are equal take equal
memory, so a rack with few of them is run and the part of the step that belongs to the middle one is repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from stackwise.curriculum.assemble import build_rack
from stackwise.curriculum.split import apply_training
from stackwise.model.block import Block, Context
from stackwise.model.cache import BlockCache
from stackwise.model.modes import autocast_to
from stackwise.model.rack import Rack, recompute_block, run_block
from stackwise.model.router import routed
from stackwise.objectives.base import Example
from stackwise.objectives.causal import CausalLM
from stackwise.planning.fake import fake_tensors, without_storage
from stackwise.planning.live import LiveBytes
from stackwise.planning.situation import Situation, shortened
from stackwise.planning.update import one_update, update_of
from stackwise.precision.fake_quant import fake_quantise
from stackwise.training.consistency import Aim, Consistency, distance
from stackwise.training.counting import StepBytes
from stackwise.training.optim import set_widths
from stackwise.training.optim_bytes import parameter_bytes
from stackwise.training.settings import TrainingSettings
from stackwise.training.stage_setup import StageSetup
from stackwise.trunk.decide import Decision
from stackwise.trunk.ledger import DEVICE_ITEMS
from stackwise.trunk.parking import Parked, parked_blocks
from stackwise.trunk.residency import trains
from stackwise.trunk.streaming import Streamer

LIVE = "live"
"""All tensors of a step, as `LiveBytes` sees them; the other items are those of `StepBytes`."""
DEVICE = "device"
"""The items of the ledger that are on the device, together."""
HOST = "host.boundaries"
ITEMS = (LIVE, DEVICE, *DEVICE_ITEMS, HOST)


@dataclass(frozen=True)
class Change:
    """Of one item in a stretch of a step: bytes that came, by block that made them (-1: none), and the most above the
    start."""

    came: tuple[tuple[int, int], ...]
    peak: int


@dataclass(frozen=True)
class Segment:
    """A stretch of a step. `block` is the block it belongs to, in forward order, or -1."""

    block: int
    changes: dict[str, Change]

    def delta(self, item: str, counts: list[int]) -> int:
        """Bytes that stay after it (negative: went) when each block stands for so many."""
        came = self.changes[item].came
        if self.block >= 0:
            return counts[self.block] * sum(change for _, change in came)
        return sum(change * (counts[owner] if owner >= 0 else 1) for owner, change in came)


class Step(NamedTuple):
    """A step in segments; `boundaries`: (block, bytes of the output that gradients pass)."""

    segments: tuple[Segment, ...]
    boundaries: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trace:
    """What a step takes besides weights and moments, in bytes: the most of each of ITEMS at once, and the streams
    between blocks that gradients pass, which are part of the activations (of parked blocks: on the host)."""

    most: dict[str, int]
    boundaries: int


def trace(situation: Situation) -> Trace:
    """The trace of a step, from a rack with few blocks."""
    return _both(*shortened(situation))


def full_trace(situation: Situation) -> Trace:
    """The same from all blocks; slow, and equal."""
    return _both(situation, [1] * len(situation.spec.blocks))


def _both(situation: Situation, counts: list[int]) -> Trace:
    """The items as they are counted; all tensors alive as the run holds them."""
    counted = _sum_up(_step(situation), counts)
    if not situation.recompute:
        return counted
    plain = _sum_up(
        _step(situation, counted=False), counts
    )  # counting runs blocks again in a form of its own
    return replace(counted, most={**counted.most, LIVE: plain.most[LIVE]})


def _sum_up(step: Step, counts: list[int]) -> Trace:
    """Put the segments in a row, those of a block as often as it stands for one."""
    most = {}
    for item in ITEMS:
        now = peak = 0
        for segment in step.segments:
            delta = segment.delta(item, counts)
            count = 1 if segment.block < 0 else counts[segment.block]
            peak = max(peak, now + segment.changes[item].peak + max(0, delta - delta // count))
            now += delta
        most[item] = peak
    return Trace(most, sum(size * counts[block] for block, size in step.boundaries))


class _Marks:
    """Cuts a step into segments."""

    def __init__(self, live: LiveBytes, step: StepBytes) -> None:
        self.live, self.ledger = live, step.ledger
        self.segments: list[Segment] = []
        self.boundaries: dict[int, int] = {}
        self._block: int | None = None

    def start(self, block: int = -1) -> None:
        """End the segment before and begin the next."""
        self.end()
        self._block, self._before = block, self._now()
        self._elsewhere = self.live.elsewhere()
        self.live.start(block)
        self.ledger.restart()

    def end(self) -> None:
        """End the last segment."""
        if self._block is None:
            return
        now, most = self._now(), Counter(self.ledger.most)
        most[LIVE], most[DEVICE] = self.live.peak, self.ledger.peak
        came: dict[str, tuple[tuple[int, int], ...]]
        came = {item: ((-1, now[item] - was),) for item, was in self._before.items()}
        moved = self._elsewhere - self.live.elsewhere()
        came[LIVE] = (*sorted(self.live.changes.items()), (-1, moved))
        changes = {item: Change(came[item], most[item] - was) for item, was in self._before.items()}
        self.segments.append(Segment(self._block, changes))
        self._block = None

    def _now(self) -> dict[str, int]:
        held = Counter(self.ledger.live)
        held[LIVE], held[DEVICE] = self.live.now, self.ledger.on_device
        return {item: held[item] for item in ITEMS}


_RUN = Decision(False, "run")


@lru_cache(maxsize=256)
def _step(situation: Situation, counted: bool = True) -> Step:
    with torch.device("meta"):
        rack = build_rack(situation.spec)
    updates = _updates(rack, situation) if situation.settings.memory == "fused" else {}
    with fake_tensors(situation.kind):
        without_storage(rack)
        return _run(rack, situation, counted, updates)


def _run(rack: Rack, situation: Situation, counted: bool, updates: dict[str, int]) -> Step:
    device = torch.device("cpu")
    split = apply_training(rack, situation.units, situation.alone)
    # The loop's own forward pass; the trunk is run, never read, and the optimizer is not part of a trace.
    objective = CausalLM()
    setup = StageSetup(rack, objective, set(situation.units), split, None, _RUN, None, 0.0, situation.seq_len)  # type: ignore[arg-type]
    if situation.held:
        setup.consistency = Consistency(1.0, situation.held, None)
    for stack in rack.stacks:
        if situation.rounding and f"stack:{stack.uid}" in situation.units:
            fake_quantise(stack, stack.frozen_format or situation.rounding)
    set_widths(rack, TrainingSettings(optimizer=situation.settings))
    _reside(rack, device, situation)
    step, on_host = StepBytes(rack), _HostGradients(rack)
    live = LiveBytes(
        [*rack.parameters(), *rack.buffers()],
        lambda: step.ledger.live.get(HOST, 0) + on_host.bytes,
    )
    marks = _Marks(live, step)
    freed = _update_at_once(rack, updates) if updates else []
    with live, step.counting() if counted else nullcontext():
        _mark_blocks(rack, marks)
        for _ in range(situation.micro_batches):
            marks.start()
            example = _example(situation)
            aim = None if setup.consistency is None else Aim(_example(situation), torch.ones(()))
            with autocast_to(situation.dtype, device):
                with routed(rack, 1.0):
                    new, hidden = (
                        (None, setup.forward(example)) if aim is None else setup.forward_past(example)
                    )
                marks.start()
                loss = objective.loss(hidden, rack.io.head, example, situation.loss_rows)[0]
                if aim is not None and new is not None:
                    loss = loss + aim.factor * distance(rack, objective, new, aim.lighter)
            loss = loss / objective.weight(example)
            del hidden, new
            marks.start()
            loss.backward()
            del loss, example, aim
        marks.end()
    for hook in freed:
        hook.remove()
    return Step(tuple(marks.segments), tuple(marks.boundaries.items()))


def _reside(rack: Rack, device: torch.device, situation: Situation) -> None:
    """What `trunk.residency.reside` does, but for moving tensors, which have no place here."""
    for block in rack.blocks():
        if (situation.trained if trains(block) else situation.frozen) != "resident":
            block.parked = Parked()
    rest = recompute_block if situation.recompute else run_block
    rack.runner = Streamer(rack.blocks(), device, rest=rest) if parked_blocks(rack.blocks()) else rest


class _HostGradients:
    """Bytes of the gradients that parked blocks keep in host memory."""

    def __init__(self, rack: Rack) -> None:
        self.bytes, self._seen = 0, set()  # type: ignore[var-annotated]
        for block in parked_blocks(rack.blocks()):
            for parameter in block.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._came)

    def _came(self, parameter: Tensor) -> None:
        if id(parameter) not in self._seen:
            self._seen.add(id(parameter))
            self.bytes += parameter.nbytes


def _updates(rack: Rack, situation: Situation) -> dict[str, int]:
    """By name: what the step of each parameter takes on the device, moments that visit it for the step included."""
    settings = situation.settings
    taken = {}
    for name, parameter in rack.named_parameters():
        taken[name] = one_update(update_of(name, parameter, settings), 1, settings, situation.kind)
        if settings.state_device == "host":
            taken[name] += parameter_bytes(name, parameter, settings).moments
    return taken


def _update_at_once(rack: Rack, updates: dict[str, int]) -> list[RemovableHandle]:
    """As `Optimizers.in_backward`: what the step of a tensor takes comes and goes, and so does its gradient."""
    parked = {p for block in parked_blocks(rack.blocks()) for p in block.parameters()}

    def hook(taken: int) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            torch.empty(taken, dtype=torch.uint8)
            parameter.grad = None

        return step

    return [
        p.register_post_accumulate_grad_hook(hook(0 if p in parked else updates[name]))
        for name, p in rack.named_parameters()
        if p.requires_grad
    ]


def _mark_blocks(rack: Rack, marks: _Marks) -> None:
    """Begin a segment where a block's forward pass begins, and where its backward pass does."""
    runner = rack.runner

    def marked(index: int, block: Block, x_BTD: Tensor, context: Context, cache: BlockCache | None) -> Tensor:
        marks.start(index)
        out = runner(index, block, x_BTD, context, cache)
        if out.requires_grad:
            marks.boundaries[index] = out.nbytes
            out.register_hook(lambda grad: marks.start(index))
        return out

    rack.runner = marked


def _example(situation: Situation) -> Example:
    """What the objective makes of a batch. One that hides tokens names those that are scored, and weighs its rows."""
    example = CausalLM().corrupt(_batch(situation))
    if situation.spec.time is not None:
        example = example._replace(time=torch.ones(situation.batch_size))
    if situation.scored == 1:
        return example
    rows = torch.empty(situation.batch_size)
    scored = torch.empty(max(1, round(situation.scored * situation.tokens)), dtype=torch.int64)
    return example._replace(weights=rows, totals=rows, scored=scored)


def _batch(situation: Situation) -> dict[str, Any]:
    """What the loader hands out, without values."""
    shape = (situation.batch_size, situation.seq_len)
    batch = {
        "input_ids": torch.empty(shape, dtype=torch.int64),
        "next_ids": torch.empty(shape[:1], dtype=torch.int64),
    }
    if situation.edges:
        batch["document_ids"] = torch.empty(shape, dtype=torch.int32)
        batch["position_ids"] = torch.empty(shape, dtype=torch.int64)
    return batch
