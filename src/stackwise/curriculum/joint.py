"""The joint phase: after the last growth the rack is tuned together, for a share of the run's FLOPs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from stackwise.config.notes import tunes_jointly
from stackwise.config.rules import stacks_at_the_end
from stackwise.curriculum import choices
from stackwise.curriculum.costs import stage_flops
from stackwise.curriculum.stage import Stage
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

ENOUGH_STEPS, ENOUGH_SHARE = 1000, 0.2
"""A joint phase is long enough with so many optimizer steps, or with that share of the run's."""


def short_phase(config: StackWiseConfig, stages: list[Stage]) -> str | None:
    """A note where the joint phase at the end of a run's stages has few steps; null where not, or where there is none.

    A share of the FLOPs is a smaller share of the steps, since its steps are the dearest of the run. In runs too short
    to train much at all nothing is noted.
    """
    if not tunes_jointly(config):
        return None
    count = len(_thawed(config, stacks_at_the_end(config)))
    before, steps = (
        sum(stage.steps for stage in stages[:-count]),
        sum(stage.steps for stage in stages[-count:]),
    )
    enough = min(ENOUGH_STEPS, math.ceil(before * ENOUGH_SHARE / (1 - ENOUGH_SHARE)))
    if steps >= enough or before < ENOUGH_STEPS:
        return None
    costs = stage_flops(config, stages)
    wanted = sum(costs[-count:]) / steps * enough
    fraction = math.ceil(100 * wanted / (sum(costs[:-count]) + wanted)) / 100
    return (
        f"training.progressive.joint_tuning_fraction {config.training.progressive.joint_tuning_fraction:g} leaves "
        f"{steps:,} of the run's {before + steps:,} steps for the joint phase: too few to tune together what was trained "
        f"apart. {fraction:g} gives it {enough:,}"
    )


def joint_stages(config: StackWiseConfig, before: list[Stage], start: RackSpec | None = None) -> list[Stage]:
    """The stages of the joint phase after `before`, of equal length where there are several.

    `start`: the rack that the first stage of `before` finds; null: the config's.
    """
    progressive, count = config.training.progressive, stacks_at_the_end(config)
    state = progressive.growth_optimizer.replace("copy", "carry")
    if any(stage.alone is not None for stage in before):
        state = "reset"  # the last of them may have been any stack, in any process
    end = max(
        (stage.data_start + stage.steps for stage in before if stage.data_start is not None), default=None
    )
    listed = [
        Stage(
            name="joint" if name == "" else f"joint, {name}",
            n_stacks=count,
            trains=trains,
            steps=1,
            lr=progressive.joint_lr,
            trunk_lr=progressive.joint_lr or config.training.trunk_lr,
            io_lr=progressive.joint_lr,
            adapter_lr=progressive.joint_lr,
            # Within the phase nothing grows, so the moments are still right.
            optimizer_state="carry" if i else state,
        )
        for i, (name, trains) in enumerate(_thawed(config, count))
    ]
    costs = stage_flops(config, [*before, *listed], start)
    share = progressive.joint_tuning_fraction
    steps = max(1, round(share / (1 - share) * sum(costs[: len(before)]) / sum(costs[len(before) :])))
    stages, total = [], steps * len(listed)
    for i, stage in enumerate(listed):
        stage = replace(stage, steps=steps, warmup_steps=choices.rewarmup(config, steps))
        if len(listed) > 1:
            stage = replace(stage, schedule=(i * steps, total))
        if end is not None:
            stage = replace(stage, data_start=end + i * steps)
        stages.append(stage)
    return stages


def _thawed(config: StackWiseConfig, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """(name, selectors) of each stage of the phase."""
    lookup, output = choices.embedding(config, first=True), choices.head(config, first=True)
    tail, trunk = choices.tail(config), ["trunk"] if count > 1 else []
    match config.training.progressive.joint_tuning_backbone:
        case "frozen":
            return [("", ("new", *tail, *output))]
        case "qlora":
            return [("", (*choices.adapters(config), *tail, *output[1:]))]
        case "gradual":
            return [
                (
                    f"{n} of {count} stacks",
                    (
                        *(lookup if n == count else []),
                        *(f"stack:{p}" for p in range(count - n, count)),
                        *tail,
                        *output,
                    ),
                )
                for n in range(1, count + 1)
            ]
        case _:
            return [("", (*lookup, "new", *trunk, *tail, *output))]
