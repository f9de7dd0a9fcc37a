"""What a run will do and cost, before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stackwise.config.resolve import Derived, resolve

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


@dataclass(frozen=True)
class StagePlan:
    """One stage. Bytes are of weights, gradients and moments, exact for fp32; `flops` of the whole stage."""

    name: str
    grows: str
    trains: list[str]
    n_stacks: int
    prefix_blocks: int
    total_blocks: int
    steps: int
    tokens: int
    parameters: int
    trainable_parameters: int
    flops: float
    bytes: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """All stages of a run, and the values that were derived with their reasons."""

    stages: list[StagePlan]
    derived: list[Derived]
    notes: list[str]

    @property
    def total_flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The largest stage's weights, gradients and moments."""
        return max(sum(stage.bytes.values()) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "total_flops": self.total_flops,
            "total_tokens": self.total_tokens,
            "peak_bytes": self.peak_bytes,
        }


MOMENTS = {"AdamW": 2, "Adam": 2, "SGD": 1, "Muon": 1}
"""Moments per trained parameter; Muon's is for the matrices of the blocks, the rest has AdamW's two."""


def plan(config: StackWiseConfig) -> Plan:
    """Lay out the stages of a config and count them on modules without storage; nothing is allocated.

    `model.vocab_size` may be null for the byte tokenizer; other tokenizers, and budgets in epochs, need the data,
    which is then prepared first.
    """
    import torch

    from stackwise.curriculum.assemble import build_rack
    from stackwise.curriculum.costs import flops_per_token, stage_tokens
    from stackwise.curriculum.curricula import stages
    from stackwise.curriculum.specs import first_spec, stage_specs
    from stackwise.curriculum.split import apply_training, trained_units

    config.validate()
    vocab_size, steps_per_epoch = _data_facts(config)
    config, derived = resolve(config, vocab_size=vocab_size)
    rows = []
    listed = stages(config, steps_per_epoch)
    for stage, spec in zip(
        listed, stage_specs(config, listed, first_spec(config, listed), "fp32"), strict=True
    ):
        with torch.device("meta"):
            rack = build_rack(spec)
        split = apply_training(rack, trained_units(spec, stage), stage.alone)
        tokens = stage.steps * stage_tokens(config, stage)
        rows.append(
            StagePlan(
                name=stage.name,
                grows=""
                if stage.grow is None
                else f"{stage.grow.op} {stage.grow.n_blocks} ({stage.grow.init})",
                trains=list(stage.trains),
                n_stacks=stage.n_stacks,
                prefix_blocks=split.prefix_blocks,
                total_blocks=split.n_blocks,
                steps=stage.steps,
                tokens=tokens,
                parameters=rack.get_parameter_count(),
                trainable_parameters=rack.get_trainable_parameter_count(),
                flops=tokens * flops_per_token(config, stage, spec),
                bytes=_bytes(rack, config),
            )
        )
    return Plan(rows, derived, config.notes())


def _bytes(rack: Any, config: StackWiseConfig) -> dict[str, int]:
    """fp32 weights, gradients and moments of a rack whose trainable parameters are marked."""
    from stackwise.training.optim import is_block_matrix

    kind = config.training.optimizer.optimizer_type
    moments = 0
    for name, parameter in rack.named_parameters():
        if parameter.requires_grad:
            main = kind != "Muon" or is_block_matrix(name, parameter)
            count = MOMENTS[kind] if main else MOMENTS["AdamW"]
            counter = 4 if not main or kind in ("Adam", "AdamW") else 0  # a step counter per tensor
            moments += count * parameter.nbytes + counter
    return {
        "parameters": sum(p.nbytes for p in rack.parameters()),
        "gradients": sum(p.nbytes for p in rack.parameters() if p.requires_grad),
        "moments": moments,
    }


def _data_facts(config: StackWiseConfig) -> tuple[int | None, int | None]:
    """Vocabulary and steps of an epoch, from the data where they depend on it."""
    from stackwise.data.prepare import prepare
    from stackwise.data.tokenizers import ByteTokenizer
    from stackwise.training.run import loader_steps, make_loader

    if config.training.max_steps is not None:
        if config.model.vocab_size is not None:
            return None, None
        if config.data.tokenizer == "byte":
            return ByteTokenizer().vocab_size, None
    resolved, _ = resolve(config)
    assert resolved.data.cache_dir is not None
    corpus = prepare(resolved.data, resolved.data.cache_dir)
    return corpus.tokenizer.vocab_size, loader_steps(resolved, make_loader(resolved, corpus))
