"""What a stage trains with, made from a rack that has grown already: split, residency, trunk, optimizer, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stackwise.config.objective_rules import corruption_of, masks, scored_share
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.split import Split, apply_training, split_of, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.block import Context
from stackwise.model.flops import block_forward_flops, step_flops
from stackwise.model.rack import Rack
from stackwise.objectives.base import Example, Objective
from stackwise.objectives.head import context_of
from stackwise.precision.fake_quant import fake_quantise
from stackwise.training.consistency import Consistency
from stackwise.training.optim import Optimizers, set_widths
from stackwise.trunk.cached import CachedPrefix, open_prefix
from stackwise.trunk.decide import Decision, overlap
from stackwise.trunk.legality import Corruption
from stackwise.trunk.manager import MemoryManager
from stackwise.trunk.residency import reside


@dataclass
class StageSetup:
    """`prefix` null: the frozen prefix is computed at every visit; `decision` says why."""

    rack: Rack
    objective: Objective
    units: set[str]
    split: Split
    prefix: CachedPrefix | None
    decision: Decision
    optimizers: Optimizers
    flops_per_token: float
    """FLOP of a step per token, without the blocks of a stored prefix."""
    seq_len: int
    consistency: Consistency | None = None
    """What the output of a prepended stack is held to."""
    _stored_flops: float = 0.0

    def forward(self, example: Example) -> Tensor:
        """input_ids [B, T] -> what the head reads, [B, T, D]."""
        rack, split, context = self.rack, self.split, context_of(self.rack, example)
        x_BTD = self._active(example, context)
        hidden: Tensor = rack.io.norm(rack.run(x_BTD, context, split.start, split.stop))
        return hidden

    def forward_past(self, example: Example) -> tuple[Tensor, Tensor]:
        """What the stack that is held to consistency gives, [B, T, D], and what `forward` gives."""
        assert self.consistency is not None
        rack, split, context = self.rack, self.split, context_of(self.rack, example)
        x_BTD = self._active(example, context)
        new_BTD = rack.run(x_BTD, context, split.start, self.consistency.blocks)
        return new_BTD, rack.norm(rack.run(new_BTD, context, self.consistency.blocks, split.stop))

    def _active(self, example: Example, context: Context) -> Tensor:
        """What the first block that is run at every visit reads, [B, T, D]."""
        if self.prefix is not None:
            return self.prefix(example)
        rack, split = self.rack, self.split
        with torch.set_grad_enabled(torch.is_grad_enabled() and not split.prefix):
            x_BTD = self.objective.embedded(rack.embed(example.input_ids, context), example)
            return rack.run(x_BTD, context, 0, split.prefix_blocks)

    @property
    def scales(self) -> bool:
        """Whether gradients pass a stack that computes in float16, where small ones would become zero."""
        computed_in = [stack.compute_dtype for stack in self.rack.spec.stacks for _ in stack.blocks]
        return "float16" in computed_in[self.split.start : self.split.stop]

    def read_ahead(self, coming: Mapping[str, Tensor]) -> None:
        """Begin to read what a later batch will ask a stored prefix for; `coming` has its sample_ids and draws [B]."""
        if self.prefix is None:
            return
        draws = coming["draws"] % (self.objective.draws or 1)
        if bool((draws == draws[0]).all()):  # else the batch lies on both sides of the end of a pass
            self.prefix.prefetch(coming["sample_ids"], int(draws[0]))

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
    objective: Objective,
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
        corruption=Corruption(
            objective.name,
            objective.draws,
            stage.noise,
            on_embeddings=corruption_of(config) == "gaussian" and masks(config),
        ),
    )
    flops = step_flops(
        rack.spec,
        units,
        seq_len,
        recompute=recompute or trained == "streamed",
        recompute_frozen=recompute or trunk != "resident",
        cached=split.prefix_blocks if prefix is not None else 0,
        alone=stage.alone,
        scored=scored_share(config, stage.noise),
    )
    optimizers = Optimizers(rack, stage, training)
    return StageSetup(rack, objective, units, split, prefix, decision, optimizers, flops, seq_len)
