"""The joint phase: after the last growth the rack is tuned together, for a share of the run's FLOPs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stackwise.config.rules import stacks_at_the_end
from stackwise.curriculum import choices
from stackwise.curriculum.costs import stage_flops
from stackwise.curriculum.stage import Stage
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


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
