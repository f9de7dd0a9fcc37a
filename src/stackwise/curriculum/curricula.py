"""Curricula: pure functions from a config to a list of stages. Nothing else knows which one is running.

Budgets: `training.max_steps` is the budget of one stack. append, prepend and independent give it to every stack; grow
and cyclic share out as many steps as all stacks have, so that runs of one config can be compared; the joint phase
comes on top. end to end is one stage of `training.max_steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.notes import has_own_io, tunes_jointly
from stackwise.config.rules import growth_factor, program_of, stacks_at_the_end
from stackwise.curriculum import choices
from stackwise.curriculum.joint import joint_stages
from stackwise.curriculum.program import hand_written
from stackwise.curriculum.stage import Growth, Stage
from stackwise.model.describe import stack_blocks

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def stages(config: StackWiseConfig, steps_per_epoch: int | None = None) -> list[Stage]:
    """The stages of a run: `training.stages` as they are written, else those of the curriculum.

    `steps_per_epoch` is needed where a budget is in epochs. `model.vocab_size` may still be null: the joint phase is
    then computed without the head. Raises ConfigError with everything that is wrong.
    """
    if config.training.stages is not None:
        return hand_written(config, steps_per_epoch)
    listed = CURRICULA[program_of(config)](config, stage_steps(config, steps_per_epoch))
    if tunes_jointly(config):
        listed += joint_stages(config, listed)
    return listed


def stage_steps(config: StackWiseConfig, steps_per_epoch: int | None) -> int:
    """Optimizer steps of one stack."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    if steps_per_epoch is None:
        message = "is null, so the budget depends on the size of the data, which is not known here; set it"
        raise ConfigError(Problem("training.max_steps", message))
    return max(1, steps_per_epoch * config.training.epochs_per_stack)


# --- everything at once ------------------------------------------------------------------------------------------


def end_to_end(config: StackWiseConfig, steps: int) -> list[Stage]:
    """One stage that trains everything, or under `trunk_strategy: qlora` the adapters of a loaded model."""
    count, training = stacks_at_the_end(config), config.training
    tunes = not training.progressive.enabled and training.progressive.trunk_strategy == "qlora"
    trains = ("lora:stack",) if tunes else choices.everything(config, count, True)
    return [Stage("end to end", count, trains, steps, warmup_steps=training.warmup_steps)]


def as_one(config: StackWiseConfig, steps: int) -> list[Stage]:
    """The same with the budget of all stacks, for `training.unit: rack`."""
    return end_to_end(config, steps * stacks_at_the_end(config))


def grow(config: StackWiseConfig, steps: int) -> list[Stage]:
    """A small rack, then copies of its stacks; everything trains, always."""
    training, progressive = config.training, config.training.progressive
    count, total = stacks_at_the_end(config), steps * stacks_at_the_end(config)
    factor = growth_factor(config)
    assert factor is not None, "a rule of the config"
    small = count // factor
    sizes, size = [len(blocks) for blocks in stack_blocks(config)], config.model.architecture.blocks_per_stack
    early = min(total - 1, max(1, round(progressive.growth_at * total)))
    steps_of = [early, total - early]
    growths: list[Growth | None] = [None]
    if progressive.growth_layers is not None:
        layers = tuple(progressive.growth_layers)
        growths.append(Growth("duplicate", size, progressive.new_stack_init, layers=layers))
    elif progressive.growth_pattern == "whole":
        growths.append(Growth("duplicate", size, progressive.new_stack_init, factor=count // small))
    else:
        middle = progressive.growth_pattern == "middle"
        growths += [
            _one_more(config, sizes, n, (n - 1) // 2 if middle else n - 1) for n in range(small, count)
        ]
        # Copies of the middle, as long as it is deep: PROP-1 of Saunshi et al. 2024 (arXiv 2409.19044).
        weights = [float(i + 1) if middle else 1.0 for i in range(count - small)]
        steps_of = [*choices.shares(early, weights), total - early]
    depths = [small, *range(small + 1, count + 1)] if len(growths) > 2 else [small, count]
    shared = progressive.growth_schedule == "shared"
    starts = [sum(steps_of[:i]) for i in range(len(steps_of))]
    return [
        Stage(
            name=f"{depth} {'stack' if depth == 1 else 'stacks'}",
            n_stacks=depth,
            trains=choices.everything(config, depth, growth is None),
            steps=budget,
            grow=growth,
            warmup_steps=training.warmup_steps if growth is None else choices.rewarmup(config, budget),
            schedule=(start, total) if shared else None,
            optimizer_state="reset" if growth is None else progressive.growth_optimizer,
        )
        for depth, budget, start, growth in zip(depths, steps_of, starts, growths, strict=True)
    ]


def _one_more(config: StackWiseConfig, sizes: list[int], count: int, position: int) -> Growth:
    """The map that puts a copy of the stack at a position of `count` behind it."""
    end = sum(sizes[: position + 1])
    layers = (*range(end), *range(end - sizes[position], end), *range(end, sum(sizes[:count])))
    size = config.model.architecture.blocks_per_stack
    return Growth("duplicate", size, config.training.progressive.new_stack_init, layers=layers)


# --- stack by stack ----------------------------------------------------------------------------------------------


def append(config: StackWiseConfig, steps: int) -> list[Stage]:
    """Stage k puts stack k next to the head, on what was trained before."""
    return _one_by_one(config, steps, "append")


def prepend(config: StackWiseConfig, steps: int) -> list[Stage]:
    """Stage k puts stack k next to the embedding; its loss goes through the frozen stacks behind it."""
    return _one_by_one(config, steps, "prepend")


def _one_by_one(config: StackWiseConfig, steps: int, op: str) -> list[Stage]:
    training, progressive = config.training, config.training.progressive
    shapes = stack_blocks(config)
    unlike = config.model.stacks is not None or any(shape != shapes[0] for shape in shapes)
    listed: list[Stage] = []
    for k, budget in enumerate(choices.stack_budgets(config, steps)):
        blocks = shapes[k if op == "append" else -1 - k]
        growth = Growth(op, len(blocks), progressive.new_stack_init, blocks=blocks if unlike else None)
        place, at_head = k if op == "append" else 0, op == "append"
        for i, (piece, what, part) in enumerate(choices.pieces(config, "new", place, len(blocks), budget)):
            first = not listed
            trains = [*choices.embedding(config, first), piece, *choices.tail(config)]
            trains += choices.head(config, first, auto=at_head)
            trains += choices.trunk(config) if k else []
            listed.append(
                Stage(
                    name=", ".join(filter(None, (f"stack {k + 1}", what))),
                    n_stacks=k + 1,
                    trains=tuple(trains),
                    steps=part,
                    grow=growth if k and i == 0 else None,
                    lr=training.new_stack_lr if k else None,
                    trunk_lr=training.trunk_lr,
                    warmup_steps=training.warmup_steps if first else choices.rewarmup(config, part),
                    optimizer_state="reset" if first else progressive.growth_optimizer,
                    **choices.noise(config, k),
                )
            )
    return listed


def independent(config: StackWiseConfig, steps: int) -> list[Stage]:
    """Every stack alone between embedding and head; those that are shared train with the one next to the head, first.

    What a stage does depends on its stack only, its place in the data included, so that stacks can be trained in any
    order and in several processes. After a shared start each stage adds a copy of the last copy, which has not trained
    yet, for the next one to train.
    """
    count, shapes = stacks_at_the_end(config), stack_blocks(config)
    training, progressive = config.training, config.training.progressive
    budgets, begun = choices.stack_budgets(config, steps), choices.shared_start_steps(config, steps)
    grows = begun > 0 and config.checkpoint.init_from is None
    chosen = progressive.train_stacks or range(count - 1, -1, -1)
    listed = []
    if grows:
        around = (*choices.embedding(config, True), "new", *choices.head(config, True))
        listed = [Stage("shared start", 1, around, begun, warmup_steps=training.warmup_steps, data_start=0)]
    for position in chosen:
        built = count - 1 - position
        shape, start = shapes[position], begun + sum(budgets[:built])
        n_stacks, place = len(chosen), sorted(chosen).index(position)
        growth = None
        if grows and built < count - 1:
            n_stacks, place = built + 2, 1
            growth = Growth("prepend", len(shape), "copy")
        for i, (piece, what, part) in enumerate(
            choices.pieces(config, f"stack:{place}", place, len(shape), budgets[built])
        ):
            first = built == 0 and i == 0 and not begun
            own = has_own_io(config) and (built > 0 or begun > 0)
            rate = training.new_stack_lr if built or begun else None
            listed.append(
                Stage(
                    name=", ".join(filter(None, (f"stack {built + 1}", what))),
                    n_stacks=n_stacks,
                    trains=(
                        *choices.embedding(config, first),
                        piece,
                        *([f"io:{place}"] if own else []),
                        *choices.head(config, first),
                    ),
                    steps=part,
                    grow=growth if i == 0 else None,
                    lr=rate,
                    trunk_lr=rate,
                    warmup_steps=training.warmup_steps,
                    alone=built,
                    data_start=start,
                    **choices.noise(config, built),
                )
            )
            start += part
    return listed


def cyclic(config: StackWiseConfig, steps: int) -> list[Stage]:
    """Sweeps over all stacks, and embedding, norm and head as one more unit; only the visited unit trains.

    Block-coordinate descent as in BAdam (Luo et al. 2024, arXiv 2404.02827), from the first step on. Embedding and
    head come first in a sweep: everything else learns through them. One learning rate schedule spans all visits.
    """
    training, progressive = config.training, config.training.progressive
    units: list[tuple[str, tuple[str, ...]]] = []
    for p, blocks in enumerate(stack_blocks(config)):
        units += [
            (", ".join(filter(None, (f"stack {p + 1}", what))), (piece,))
            for piece, what, _ in choices.pieces(config, f"stack:{p}", p, len(blocks), 0)
        ]
    if progressive.cycle_order == "backward":
        units.reverse()
    visits: list[tuple[str, tuple[str, ...]]] = []
    for sweep in range(progressive.cycle_sweeps):
        io = (*choices.embedding(config, sweep == 0, True), *choices.head(config, sweep == 0, True))
        listed = [("embedding and head", io), *units] if io else list(units)
        if progressive.cycle_order == "random":
            Random(f"{training.seed} {sweep}").shuffle(listed)
        visits += [(f"sweep {sweep + 1}, {name}", trains) for name, trains in listed]
    total = steps * stacks_at_the_end(config)
    each = progressive.cycle_steps or max(1, total // len(visits))
    always = (*choices.embedding(config, False), *choices.head(config, False))
    return [
        Stage(
            name=name,
            n_stacks=stacks_at_the_end(config),
            trains=tuple(dict.fromkeys((*trains, *always))),
            steps=each,
            warmup_steps=choices.rewarmup(config, each) if i else training.warmup_steps,
            schedule=(i * each, len(visits) * each),
            optimizer_state=progressive.growth_optimizer if i else "reset",
        )
        for i, (name, trains) in enumerate(visits)
    ]


CURRICULA: dict[str, Callable[[StackWiseConfig, int], list[Stage]]] = {
    "end_to_end": end_to_end,
    "as_one": as_one,
    "append": append,
    "prepend": prepend,
    "grow": grow,
    "independent": independent,
    "cyclic": cyclic,
}
