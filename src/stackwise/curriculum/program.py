"""Hand-written stages: `training.stages` as Stage records, and everything that is wrong with them."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.rules import stacks_at_the_end
from stackwise.curriculum.costs import stage_tokens, with_vocabulary
from stackwise.curriculum.layout import grow_spec
from stackwise.curriculum.specs import first_spec, newcomers, stage_spec
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Growth, Stage
from stackwise.model.block_spec import BlockSpec
from stackwise.model.describe import block_spec
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.curriculum.settings import GrowthSettings, StageSettings


def hand_written(config: StackWiseConfig, steps_per_epoch: int | None = None) -> list[Stage]:
    """The stages of `training.stages`. Raises ConfigError with everything that cannot run."""
    records = config.training.stages
    assert records
    problems: list[Problem] = []
    stages: list[Stage] = []
    sized = with_vocabulary(config)
    grows = any(record.grow is not None for record in records[1:])
    count = records[0].n_stacks or (1 if grows else stacks_at_the_end(config))
    spec: RackSpec | None = None
    for i, record in enumerate(records):
        key = f"training.stages.{i}"
        try:
            stage = _stage(config, i, record, count)
            if spec is None and stage.grow is not None:
                raise ValueError("grows, but there is nothing before the first stage")
            before = first_spec(sized, [stage]) if spec is None else spec
            grown = before if stage.grow is None else grow_spec(before, stage.grow)
        except (ValueError, TypeError) as error:  # the latter for block options that nobody knows
            problems.append(Problem(key, str(error)))
            break  # what the later stages find is not known
        count = len(grown.stacks)
        try:
            stage = replace(stage, n_stacks=count, steps=_steps(config, i, record, stage, steps_per_epoch))
            spec = stage_spec(sized, before, stage, "fp32")
            _check(config, stage, record, spec)
            _check_precision(key, stage, newcomers(before, grown))
            _check_cache(key, stage, spec)
        except ValueError as error:
            problems += error.problems if isinstance(error, ConfigError) else [Problem(key, str(error))]
            spec = grown
        stages.append(stage)
    if problems:
        raise ConfigError(problems)
    return stages


def _stage(config: StackWiseConfig, index: int, record: StageSettings, count: int) -> Stage:
    given = record.model_dump(
        exclude={"train", "name", "n_stacks", "grow", "max_steps", "max_tokens", "epochs"}
    )
    for name in ("schedule", "noise", "eval_noise"):
        if given[name] is not None:
            given[name] = tuple(given[name])
    return Stage(
        **given,
        name=record.name or f"stage {index + 1}",
        n_stacks=count,
        trains=tuple(record.train),
        steps=1,
        grow=None if record.grow is None else _growth(config, record.grow),
    )


def _growth(config: StackWiseConfig, record: GrowthSettings) -> Growth:
    kind = asdict(block_spec(config.model))
    blocks = (
        None if record.blocks is None else tuple(BlockSpec.create({**kind, **row}) for row in record.blocks)
    )
    return Growth(
        record.op,
        len(blocks or ()) or record.n_blocks or config.model.architecture.blocks_per_stack,
        record.init,
        record.factor,
        None if record.layers is None else tuple(record.layers),
        blocks,
    )


def _steps(
    config: StackWiseConfig, index: int, record: StageSettings, stage: Stage, steps_per_epoch: int | None
) -> int:
    if record.max_steps is not None:
        return record.max_steps
    tokens = stage_tokens(config, stage)
    if record.max_tokens is not None:
        return math.ceil(record.max_tokens / tokens)
    assert record.epochs is not None, "a rule of the config"
    if steps_per_epoch is None:
        message = (
            "depends on the size of the data, which is not known here; set max_steps or max_tokens instead"
        )
        raise ConfigError(Problem(f"training.stages.{index}.epochs", message, record.epochs))
    usual = stage_tokens(config, replace(stage, seq_len=None, batch_size=None))
    return max(1, math.ceil(record.epochs * steps_per_epoch * usual / tokens))


def _check(config: StackWiseConfig, stage: Stage, record: StageSettings, spec: RackSpec) -> None:
    count, limit = len(spec.stacks), config.training.progressive.max_stacks
    if count > limit:
        raise ValueError(f"grows to {count} stacks, but training.progressive.max_stacks is {limit}; raise it")
    if record.n_stacks not in (None, count):
        raise ValueError(f"has n_stacks {record.n_stacks}, but the rack has {count} stacks by then")
    if stage.alone is None:
        return
    runs = [stack.uid for stack in spec.stacks if stack.build_index == stage.alone]
    if not runs:
        known = ", ".join(str(stack.build_index) for stack in spec.stacks)
        raise ValueError(f"runs the stack with build index {stage.alone} alone; there are {known}")
    others = sorted(
        unit
        for unit in trained_units(spec, stage)
        if unit == "tail" or (":" in unit and unit.split(":")[1].split(".")[0] != runs[0])
    )
    if others:
        raise ValueError(f"trains {', '.join(others)}, which does not run in it")


def _check_precision(key: str, stage: Stage, joining: set[str]) -> None:
    if stage.precision is not None and not joining:
        message = "is for stacks that join, and none does in this stage"
        raise ConfigError(Problem(f"{key}.precision", message, stage.precision, hint="remove it"))


def _check_cache(key: str, stage: Stage, spec: RackSpec) -> None:
    """Ask the one function that decides, on modules without storage."""
    if stage.cache is not True:
        return
    import torch

    from stackwise.curriculum.assemble import build_rack
    from stackwise.curriculum.split import apply_training
    from stackwise.trunk.legality import cache_refusal

    with torch.device("meta"):
        rack = build_rack(spec)
    split = apply_training(rack, trained_units(spec, stage), stage.alone)
    if (reason := cache_refusal(rack, split.prefix)) is not None:
        raise ConfigError(Problem(f"{key}.cache", f"cannot be: {reason}", True, "auto, false, null"))
