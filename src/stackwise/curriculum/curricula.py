"""Curricula: pure functions from a config to a list of stages. Nothing else knows which one is running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.notes import tunes_jointly
from stackwise.config.rules import stacks_at_the_end
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Growth, Stage
from stackwise.model.describe import rack_spec
from stackwise.model.flops import step_flops
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def stages(config: StackWiseConfig, steps_per_epoch: int | None = None) -> list[Stage]:
    """The stages of a run.

    `steps_per_epoch` is needed when `training.max_steps` is null. `model.vocab_size` may still be null: stage budgets
    are then computed without the head.
    """
    progressive = config.training.progressive
    curriculum = CURRICULA[progressive.building_mode if progressive.enabled else "end_to_end"]
    return curriculum(config, stage_steps(config, steps_per_epoch))


def stage_steps(config: StackWiseConfig, steps_per_epoch: int | None) -> int:
    """Optimizer steps of one stack stage."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    if steps_per_epoch is None:
        raise ConfigError(
            [
                Problem(
                    "training.max_steps",
                    "is null, so the budget depends on the size of the data, which is not known here; set it",
                )
            ]
        )
    return max(1, steps_per_epoch * config.training.epochs_per_stack)


def end_to_end(config: StackWiseConfig, steps: int) -> list[Stage]:
    """One stage that trains everything."""
    trains = ["all"] if _allowed(config, "train_head", True, True) else ["embedding", "new", "trunk", "tail"]
    if not _allowed(config, "train_embedding", True, True):
        trains = ["new", "trunk", "tail", "norm", "head"] if trains == ["all"] else ["new", "trunk", "tail"]
    return [
        Stage(
            name="end to end",
            n_stacks=stacks_at_the_end(config),
            trains=tuple(trains),
            steps=steps,
            warmup_steps=config.training.warmup_steps,
        )
    ]


def append(config: StackWiseConfig, steps: int) -> list[Stage]:
    """Stage k puts stack k next to the head, on what was trained before; a joint phase may follow."""
    progressive, count = config.training.progressive, stacks_at_the_end(config)
    weights = progressive.stage_weights or [1.0] * count
    if len(weights) != count:
        message = f"must have one number per stack ({count}), got {len(weights)}"
        raise ConfigError([Problem("training.progressive.stage_weights", message)])
    budgets = [max(1, round(steps * count * w / sum(weights))) for w in weights]
    n_blocks = config.model.architecture.blocks_per_stack
    listed = []
    for k in range(count):
        first = k == 0
        trains = ["new", "tail"]
        if _allowed(config, "train_embedding", first, False):
            trains.insert(0, "embedding")
        if _allowed(config, "train_head", first, True):
            trains += ["norm", "head"]
        if not first and progressive.trunk_strategy == "trainable":
            trains.append("trunk")
        rewarm = round(progressive.rewarmup_fraction * budgets[k])
        listed.append(
            Stage(
                name=f"stack {k + 1}",
                n_stacks=k + 1,
                trains=tuple(trains),
                steps=budgets[k],
                grow=None if first else Growth("append", n_blocks, progressive.new_stack_init),
                lr=None if first else config.training.new_stack_lr,
                trunk_lr=config.training.trunk_lr,
                warmup_steps=config.training.warmup_steps if first else rewarm,
                optimizer_state="reset" if first else progressive.growth_optimizer,
            )
        )
    if tunes_jointly(config):
        listed.append(joint_stage(config, listed))
    return listed


def joint_stage(config: StackWiseConfig, before: list[Stage]) -> Stage:
    """Everything trains, for the share of the run's FLOPs that the config names."""
    progressive = config.training.progressive
    trains = ["new", "trunk", "tail"]
    if progressive.train_embedding != "never":
        trains.insert(0, "embedding")
    if progressive.train_head != "never":
        trains += ["norm", "head"]
    stage = Stage(
        name="joint",
        n_stacks=stacks_at_the_end(config),
        trains=tuple(trains),
        steps=1,
        trunk_lr=config.training.trunk_lr,
        optimizer_state="carry" if progressive.growth_optimizer == "copy" else progressive.growth_optimizer,
    )
    share = progressive.joint_tuning_fraction
    spent = sum(s.steps * flops_per_token(config, s) for s in before)
    steps = max(1, round(share / (1 - share) * spent / flops_per_token(config, stage)))
    return replace(stage, steps=steps, warmup_steps=round(progressive.rewarmup_fraction * steps))


def stage_rack(config: StackWiseConfig, stage: Stage) -> RackSpec:
    """The rack that a stage trains. A vocabulary not yet known counts as 2 tokens."""
    if config.model.vocab_size is None:
        model = config.model.model_copy(update={"vocab_size": 2})
        config = config.model_copy(update={"model": model})
    return rack_spec(config, stage.n_stacks)


def flops_per_token(config: StackWiseConfig, stage: Stage) -> float:
    """FLOP of one training step of `stage`, per token."""
    spec = stage_rack(config, stage)
    return step_flops(spec, trained_units(spec, stage), config.training.seq_len)


def _allowed(config: StackWiseConfig, key: str, first: bool, auto: bool) -> bool:
    """Does the embedding or head train in a stage? `auto`: what the curriculum does when the key says auto."""
    choice = getattr(config.training.progressive, key)
    return {"always": True, "never": False, "first": first, "auto": auto or first}[choice]


CURRICULA: dict[str, Callable[[StackWiseConfig, int], list[Stage]]] = {
    "end_to_end": end_to_end,
    "append": append,
}
