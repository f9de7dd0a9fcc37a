"""What a run will do and cost, before anything runs."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from stackwise.config.objective_rules import scored_share
from stackwise.config.resolve import resolve
from stackwise.config.rules import program_of
from stackwise.planning.devices import Device, device_named, limited
from stackwise.planning.facts import Data, compute_dtype, data_facts, has_edges, own_device
from stackwise.planning.report import Plan, StagePlan

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.curriculum.stage import Stage
    from stackwise.data.corpus import Corpus
    from stackwise.model.block_spec import BlockSpec
    from stackwise.model.spec import RackSpec
    from stackwise.planning.count import StageBytes
    from stackwise.planning.held import Held
    from stackwise.planning.situation import Situation
    from stackwise.trunk.decide import Decision

__all__ = ["Plan", "StagePlan", "estimate_memory", "plan"]


def plan(
    config: StackWiseConfig,
    device: str | None = None,
    *,
    rate: float | None = None,
    budget_gib: float | None = None,
) -> Plan:
    """Lay out the stages of a config and count them on modules without storage; nothing is allocated.

    `device`: a name of `planning.devices`, or of a device of this machine; null is the config's `training.device`.
    `rate`: FLOP per second that the run sustains; null is 40 % of the device's peak. `budget_gib`: memory to fit into;
    null is the device's. `model.vocab_size` may be null for the byte tokenizer; other tokenizers, and budgets in
    epochs, need the data, which is then prepared first.

    Raises ConfigError for a config, device or budget that cannot be, and what `prepare` raises.
    """
    config.validate()
    return plan_on(config, limited(device_named(device or own_device(config)), budget_gib), rate)


def plan_on(
    config: StackWiseConfig,
    device: Device,
    rate: float | None = None,
    corpus: Corpus | None = None,
    only: str | None = None,
) -> Plan:
    """`plan` of a valid config for a device that is at hand; `corpus`: its data, where that is at hand too.

    `only`: the name of a stage; the others are left out, which saves their time. Without such a stage: all.
    """
    from stackwise.curriculum.curricula import stages
    from stackwise.curriculum.joint import short_phase

    data = data_facts(config, corpus)
    notes = config.notes()
    config, derived = resolve(config, vocab_size=data.vocab_size, mask_id=data.mask_id)
    dtype = compute_dtype(config, device)
    speed, edges = rate or device.rate(dtype), has_edges(config)
    if (short := short_phase(config, stages(config, data.steps_per_epoch))) is not None:
        notes.append(short)
    return Plan(
        stages=_Rows(config, device, dtype, speed, data).all(edges, only),
        derived=derived,
        notes=notes,
        device=device,
        dtype=dtype,
        rate=speed,
        rate_source="given" if rate else f"{device.share:.0%} of the peak of {device.name}",
        curriculum=program_of(config),
        edges=edges,
        corpus=data.corpus,
    )


def stored_blocks(
    config: StackWiseConfig, listed: list[Stage], specs: list[RackSpec], n_rows: int
) -> list[int]:
    """Per stage of a run over `n_rows` rows: how many leading blocks it does not run, but reads from a store."""
    device = device_named(own_device(config))
    resolved, _ = resolve(config)
    rows = _Rows(resolved, device, compute_dtype(config, device), 1.0, Data(n_rows=n_rows))
    return [rows.stored(listed, index, spec) for index, spec in enumerate(specs)]


def estimate_memory(config: StackWiseConfig, device: str | None = None) -> dict[str, int]:
    """Bytes by item of the stage that takes the most memory; nothing is allocated.

    Items: parameters, gradients, moments, activations and buffers, as a run counts them; `working`, what passes on top
    of them; `peak`, the most alive at once; `host`, what is kept in host memory; `copy`, what saving beside the training
    copies into main memory; `disk`, what the run writes.
    """
    laid_out = plan(config, device)
    memory = laid_out.largest.memory
    return {
        **memory.items,
        "working": memory.working,
        "peak": memory.peak,
        "host": laid_out.host_bytes,
        "copy": laid_out.copied_bytes,
        "disk": laid_out.disk_bytes,
    }


class _Rows:
    """Plans the stages of a config one after the other."""

    def __init__(self, config: StackWiseConfig, device: Device, dtype: str, rate: float, data: Data) -> None:
        self.config, self.device, self.dtype, self.rate, self.data = config, device, dtype, rate, data

    def all(self, edges: bool, only: str | None = None) -> list[StagePlan]:
        import torch

        from stackwise.curriculum.curricula import stages
        from stackwise.curriculum.specs import first_spec, stage_specs
        from stackwise.training.device import DTYPES, run_format

        listed = stages(self.config, self.data.steps_per_epoch)
        stored = run_format(self.config, DTYPES[self.dtype], torch.device(self.device.kind))
        specs = stage_specs(self.config, listed, first_spec(self.config, listed), stored)
        rows, packed = [], 0
        wanted = {only} & {stage.name for stage in listed} or {stage.name for stage in listed}
        for index, (stage, spec) in enumerate(zip(listed, specs, strict=True)):
            if stage.name not in wanted:
                continue
            situation = self._situation(listed, index, spec, stored, edges)
            row = self._row(listed, index, situation)
            now = sum(size for name, size in row.memory.weights.items() if name != "fp32")
            row.disk["checkpoint"] += max(0, now - packed)  # stacks that were stored in their format just now
            packed = max(now, packed)
            rows.append(row)
        return rows

    def _situation(
        self, listed: list[Stage], index: int, spec: RackSpec, stored: str, edges: bool
    ) -> Situation:
        from stackwise.curriculum.split import trained_units
        from stackwise.planning.situation import Situation
        from stackwise.training.consistency import consistency_of

        stage, training = listed[index], self.config.training
        units = trained_units(spec, stage)
        consistency = consistency_of(self.config, listed, index, spec, units)
        rows, progressive = training.loss_chunk_tokens, training.progressive
        return Situation(
            spec=spec,
            units=frozenset(units),
            batch_size=stage.batch_size or training.batch_size,
            seq_len=stage.seq_len or training.seq_len,
            kind=self.device.kind,
            dtype=self.dtype,
            micro_batches=min(2, training.gradient_accumulation_steps),
            edges=edges,
            recompute=training.gradient_checkpointing,
            frozen=progressive.trunk_residency,
            trained=training.residency,
            rounding=stored if progressive.fake_quant else None,
            optimizer=training.optimizer.model_dump_json(),
            loss_rows=None if rows == "auto" else int(rows),
            alone=stage.alone,
            scored=scored_share(self.config, stage.noise),
            held=0 if consistency is None else consistency.blocks,
        )

    def stored(self, listed: list[Stage], index: int, spec: RackSpec) -> int:
        """Leading blocks whose outputs a stage reads from a store."""
        from stackwise.planning.held import held

        progressive, stage = self.config.training.progressive, listed[index]
        choice = progressive.cache_activations if stage.cache is None else stage.cache
        if choice is False:
            return 0
        situation = self._situation(listed, index, spec, "fp32", edges=False)
        own = held(situation)
        decision = self._decision(listed, index, situation, own)
        return own.prefix_blocks if decision is not None and decision.use else 0

    def _row(self, listed: list[Stage], index: int, situation: Situation) -> StagePlan:
        from stackwise.curriculum.costs import stage_tokens
        from stackwise.model.flops import step_flops, step_units
        from stackwise.planning.held import held
        from stackwise.training.keeper import copies

        stage = listed[index]
        own, memory = held(situation), _counted(situation)
        decision = self._decision(listed, index, situation, own)
        cached = own.prefix_blocks if decision is not None and decision.use else 0
        tokens = stage.steps * stage_tokens(self.config, stage)
        again = situation.recompute or situation.trained == "streamed"
        frozen_again = situation.recompute or situation.frozen != "resident"
        per_token = step_flops(
            situation.spec,
            situation.units,
            situation.seq_len,
            recompute=again,
            recompute_frozen=frozen_again,
            cached=cached,
            alone=stage.alone,
            scored=situation.scored,
        )
        flops = tokens * per_token
        source, reason = self._trunk(situation, own, decision)
        learned = own.both("gradients") + own.both(
            "moments"
        )  # trained weights are as wide as their gradients
        return StagePlan(
            name=stage.name,
            grows=_growth(stage),
            trains=list(stage.trains),
            n_stacks=stage.n_stacks,
            prefix_blocks=own.prefix_blocks,
            trained_blocks=sum(work.trains for work in situation.works()),
            total_blocks=len(situation.spec.blocks),
            steps=stage.steps,
            tokens=tokens,
            parameters=own.both("parameters"),
            active_parameters=own.both("parameters") - round(sum(map(_idle, situation.spec.blocks))),
            trainable_parameters=own.both("trainable"),
            flops=flops,
            units=step_units(
                situation.spec, situation.units, recompute=again, cached=cached, alone=stage.alone
            ),
            hours=flops / self.rate / 3600,
            memory=memory,
            fits=self.device.verdict(memory.peak),
            trunk=source,
            trunk_reason=reason,
            copied_bytes=learned if copies(self.config.checkpoint, self.device.kind, learned) else 0,
            disk={
                "checkpoint": learned,
                "resume": self.config.checkpoint.keep_last * learned,
                "cache": decision.predicted_bytes if decision is not None and decision.use else 0,
            },
        )

    def _decision(self, listed: list[Stage], index: int, situation: Situation, own: Held) -> Decision | None:
        """Whether the stage reads its prefix from a store, as the run would decide; null: it has no prefix."""
        from stackwise.training.stage_setup import shared_samples
        from stackwise.trunk.decide import NOMINAL, decide, work_of
        from stackwise.trunk.manager import MemoryManager

        if not own.prefix_blocks:
            return None
        stage, progressive = listed[index], self.config.training.progressive
        visits = stage.steps * situation.batch_size * self.config.training.gradient_accumulation_steps
        known = self.data.n_rows
        follows, later = shared_samples(listed, index, self.config, known or 10**12)
        stacks, ends = situation.spec.stacks, [0]
        for stack in stacks:
            ends.append(ends[-1] + len(stack.blocks))
        work = work_of(
            situation.spec,
            own.prefix_blocks,
            seq_len=situation.seq_len,
            samples=min(known or visits, visits),
            visits=visits,
            dtype=progressive.cache_dtype,
            below_blocks=max(end for end in ends if end < own.prefix_blocks) if follows else 0,
            below=follows,
            later=later,
        )
        choice = progressive.cache_activations if stage.cache is None else stage.cache
        room = MemoryManager.of(progressive).room(None)
        return decide(choice, own.refusal, work, room, NOMINAL[self.device.kind])

    def _trunk(self, situation: Situation, own: Held, decision: Decision | None) -> tuple[str, str]:
        """Where the frozen blocks' outputs come from, and why."""
        frozen = any(not work.trains for work in situation.works())
        home = situation.frozen if situation.frozen != "resident" else ""
        if decision is not None:
            reason = decision.reason
            if self.data.n_rows is None and not own.refusal:
                reason += " (reckoned without the data, as if no sample came twice)"
            return "cached" if decision.use else home or "recomputed", reason
        if not frozen:
            return "none", "every block trains"
        if situation.alone is not None:
            return "none", "one stack runs alone"
        return (
            home or "recomputed",
            "gradients pass the frozen blocks, so their outputs are needed at every visit",
        )


@lru_cache(maxsize=512)
def _counted(situation: Situation) -> StageBytes:
    from stackwise.planning.count import count_bytes

    return count_bytes(situation)


def _growth(stage: Stage) -> str:
    grow = stage.grow
    if grow is None:
        return ""
    what = f"x {grow.factor}" if grow.op == "duplicate" and grow.layers is None else grow.n_blocks
    return f"{grow.op} {what} ({grow.init})"


def _idle(spec: BlockSpec) -> float:
    """Numbers in the matrices of a block that a token does not meet."""
    from stackwise.model.flops import active_matrix_parameters, block_matrix_parameters

    return block_matrix_parameters(spec) - active_matrix_parameters(spec)
