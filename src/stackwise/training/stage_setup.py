"""What a stage trains with, made from a rack that has grown already: split, residency, trunk, optimizer, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.split import Split, apply_training, split_of, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.flops import block_forward_flops, step_flops
from stackwise.model.rack import Rack
from stackwise.objectives.causal import Example
from stackwise.precision.fake_quant import fake_quantise
from stackwise.training.optim import Optimizers, set_widths
from stackwise.trunk.cached import CachedPrefix, open_prefix
from stackwise.trunk.decide import Decision, overlap
from stackwise.trunk.manager import MemoryManager
from stackwise.trunk.residency import reside


@dataclass
class StageSetup:
    """`prefix` null: the frozen prefix is computed at every visit; `decision` says why."""

    rack: Rack
    units: set[str]
    split: Split
    prefix: CachedPrefix | None
    decision: Decision
    optimizers: Optimizers
    flops_per_token: float
    """FLOP of a step per token, without the blocks of a stored prefix."""
    seq_len: int
    _stored_flops: float = 0.0

    def forward(self, example: Example) -> Tensor:
        """input_ids [B, T] -> what the head reads, [B, T, D]."""
        rack, split = self.rack, self.split
        context = rack.make_context(
            example.input_ids, example.attention_mask, example.position_ids, example.document_ids
        )
        if self.prefix is not None:
            x_BTD = self.prefix(example)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not split.prefix):
                x_BTD = rack.embed(example.input_ids, context)
                x_BTD = rack.run(x_BTD, context, 0, split.prefix_blocks)
        hidden: Tensor = rack.norm(rack.run(x_BTD, context, split.start, split.stop))
        return hidden

    def prefix_flops(self) -> float:
        """FLOP that filling the store has taken since the last call."""
        if self.prefix is None:
            return 0.0
        blocks = self.rack.spec.blocks
        done = sum(
            rows * block_forward_flops(block, self.seq_len) * self.seq_len
            for rows, block in zip(self.prefix.rows_run, blocks, strict=False)
        )
        new, self._stored_flops = done - self._stored_flops, done
        return new


def shared_samples(
    stages: Sequence[Stage], index: int, config: StackWiseConfig, n_samples: int
) -> tuple[float, float]:
    """Share of a stage's samples that the stage before has seen, and share that the next one sees too, if it appends."""
    training = config.training
    spans: list[tuple[int, int]] = []
    at = 0
    for stage in stages:
        rows = (stage.batch_size or training.batch_size) * training.gradient_accumulation_steps
        at = at if stage.data_start is None else stage.data_start * rows
        spans.append((at, at + stage.steps * rows))
        at += stage.steps * rows

    def share(first: int, second: int) -> float:
        if not 0 <= first < second < len(stages):
            return 0.0
        a, b = stages[first], stages[second]
        if (a.seq_len, b.grow is not None and b.grow.op) != (b.seq_len, "append"):
            return 0.0
        return overlap(spans[first], spans[second], n_samples, shuffled=config.data.shuffle)

    return share(index - 1, index), share(index, index + 1)


def set_up(
    rack: Rack,
    stage: Stage,
    config: StackWiseConfig,
    *,
    device: torch.device,
    run_format: str,
    manager: MemoryManager,
    identity: Mapping[str, str],
    n_samples: int | None,
    follows: float,
    later: float,
    stores: bool | None = None,
) -> StageSetup:
    """Freeze, place and wrap the rack as the stage wants it.

    `run_format`: how stacks are stored once they freeze. `identity` and `n_samples` name the data for stored outputs
    (`n_samples` null: its samples have no ids); `follows` and `later`: see `trunk.cached.open_prefix`;
    `stores`: what was decided when the stage began, for one that is taken up again.
    """
    training, progressive = config.training, config.training.progressive
    seq_len, rows = stage.seq_len or training.seq_len, stage.batch_size or training.batch_size
    units = trained_units(rack.spec, stage)
    split = apply_training(rack, units, stage.alone)
    assert split == split_of(rack, stage.alone)
    if progressive.fake_quant:
        for stack in rack.stacks:
            format = stack.frozen_format or run_format
            fake_quantise(stack, format if f"stack:{stack.uid}" in units else None)
    set_widths(rack, training)
    recompute = training.gradient_checkpointing
    trunk, trained = progressive.trunk_residency, training.residency
    folder = Path(progressive.cache_dir)
    reside(rack, device, frozen=trunk, trained=trained, recompute=recompute, folder=folder)
    if training.compile:
        for block in rack.blocks():
            if block._compiled_call_impl is None:
                block.compile()
    prefix, decision = open_prefix(
        manager,
        rack,
        split.prefix,
        choice=progressive.cache_activations if stage.cache is None else stage.cache,
        begun=stores,
        identity=identity,
        n_samples=n_samples,
        seq_len=seq_len,
        visits=stage.steps * rows * training.gradient_accumulation_steps,
        follows=follows,
        later=later,
    )
    flops = step_flops(
        rack.spec,
        units,
        seq_len,
        recompute=recompute or trained == "streamed",
        recompute_frozen=recompute or trunk != "resident",
        cached=split.prefix_blocks if prefix is not None else 0,
        alone=stage.alone,
    )
    optimizers = Optimizers(rack, stage, training)
    return StageSetup(rack, units, split, prefix, decision, optimizers, flops, seq_len)
