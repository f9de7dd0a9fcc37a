"""The stages of a run that starts from a rack of one's own: what is there is kept, what has not trained comes first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from stackwise.config.notes import tunes_jointly
from stackwise.config.rules import growth_factor, program_of, stacks_at_the_end
from stackwise.curriculum.curricula import CURRICULA
from stackwise.curriculum.joint import joint_stages
from stackwise.curriculum.stage import Stage
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def with_target(config: StackWiseConfig, mode: str, stacks: int, present: int) -> StackWiseConfig:
    """The config of a progressive run in a building mode that ends with `stacks`, from `present` ones."""
    progressive = config.training.progressive.model_copy(
        update={"target_stacks": stacks, "building_mode": mode, "enabled": True}
    )
    # Of a rack that has begun to grow, what is there is the small rack.
    if mode == "grow" and 0 < present < stacks and stacks % present == 0:
        progressive.growth_factor = stacks // present
    training = config.training.model_copy(update={"progressive": progressive, "stages": None})
    return config.model_copy(update={"training": training})


def stacks_at_the_start(config: StackWiseConfig) -> int:
    """Stacks that the first stage of a progressive config finds."""
    count, program = stacks_at_the_end(config), program_of(config)
    if program in ("append", "prepend") or starts_together(config):
        return 1
    return count // (growth_factor(config) or 1) if program == "grow" else count


def starts_together(config: StackWiseConfig) -> bool:
    """Whether independent stacks begin as one stack, which is trained here."""
    shared = config.training.progressive.shared_start_fraction > 0
    return program_of(config) == "independent" and shared and config.checkpoint.init_from is None


def stages_from(config: StackWiseConfig, spec: RackSpec, trained: Collection[str], steps: int) -> list[Stage]:
    """The stages that take the rack `spec` to the config's target. `trained`: uids of stacks that have trained.

    `steps`: optimizer steps of one stack. A rack that its building mode cannot grow from is a ValueError.
    """
    program, present, end = program_of(config), len(spec.stacks), stacks_at_the_end(config)
    if present == end and all(stack.uid in trained for stack in spec.stacks):
        return []
    templates = CURRICULA[program](config, steps)
    if program in ("append", "prepend"):
        stages = _one_by_one(templates, spec, trained)
    elif program == "grow":
        if present not in {stage.n_stacks for stage in templates}:
            depths = ", ".join(str(stage.n_stacks) for stage in templates)
            raise ValueError(f"grow goes through {depths} stacks, and the rack has {present}")
        stages = [stage for stage in templates if stage.n_stacks >= present]
        stages[0] = replace(stages[0], grow=None)
        if all(stack.uid in trained for stack in spec.stacks):
            stages = stages[1:]
    elif starts_together(config):
        if present != 1:
            raise ValueError(
                f"training.progressive.shared_start_fraction starts from one stack, and the rack has {present}"
            )
        stages = templates
    elif program == "independent":
        # The curriculum counts from the head; the stacks here may have been built in any order.
        stages = [replace(s, alone=spec.stacks[end - 1 - (s.alone or 0)].build_index) for s in templates]
    else:
        stages = templates
    stages = [_around(stage, spec) for stage in stages]
    if stages and tunes_jointly(config):
        stages += [_around(stage, spec) for stage in joint_stages(config, stages, spec)]
    return stages


def _one_by_one(templates: list[Stage], spec: RackSpec, trained: Collection[str]) -> list[Stage]:
    built = sorted(spec.stacks, key=lambda stack: stack.build_index)
    stages = []
    for template in templates:
        if template.n_stacks > len(built):
            stages.append(template)
        elif built[template.n_stacks - 1].uid not in trained:
            position = spec.stacks.index(built[template.n_stacks - 1])
            trains: list[str] = []
            for selector in template.trains:
                if selector == "trunk":
                    trains += [f"stack:{p}" for p in range(len(built)) if p != position]
                elif selector.startswith("block:"):
                    trains.append(f"block:{position}.{selector.partition('.')[2]}")
                else:
                    trains.append(f"stack:{position}" if selector == "new" else selector)
            stages.append(replace(template, n_stacks=len(built), trains=tuple(trains), grow=None))
    return stages


def _around(stage: Stage, spec: RackSpec) -> Stage:
    """Global head blocks train with the head, where this rack has any."""
    trains = [selector for selector in stage.trains if selector != "tail"]
    if spec.tail and ("tail" in stage.trains or "head" in trains):
        trains.append("tail")
    return replace(stage, trains=tuple(trains))


def by_unit(config: StackWiseConfig, spec: RackSpec, steps: int) -> list[Stage]:
    """The stages that train a finished rack piece by piece, from the embedding on, each for `steps`."""
    progressive, count = config.training.progressive, len(spec.stacks)
    warmup = config.training.warmup_steps
    if config.training.unit == "rack":
        return [Stage("rack", count, ("all",), steps, warmup_steps=warmup)]
    pieces: list[tuple[str, str]] = []
    for p, stack in enumerate(spec.stacks):
        if config.training.unit == "stack":
            pieces.append((f"stack {p + 1}", f"stack:{p}"))
        else:
            pieces += [(f"stack {p + 1}, block {i + 1}", f"block:{p}.{i}") for i in range(len(stack.blocks))]
    return [
        _around(
            Stage(
                name=name,
                n_stacks=count,
                trains=(*(["embedding"] if i == 0 else []), piece, "norm", "head"),
                steps=steps,
                warmup_steps=warmup if i == 0 else round(progressive.rewarmup_fraction * steps),
                optimizer_state="reset" if i == 0 else progressive.growth_optimizer,
            ),
            spec,
        )
        for i, (name, piece) in enumerate(pieces)
    ]
