"""A prepended stack delivers what the stacks behind it were trained to receive.

    lambda * | rms(h) - rms(Emb(x lighter)) |^2        mean over the width and all positions that are no padding

h is what comes out of the new stack, which reads heavy noise; `Emb(x lighter)` is the embedding of the same samples
under the noise of the stacks behind it, which read that when they trained. Both are brought to unit rms, and the second
is constant. Masks of one sample lie inside each other, so the new stack learns to fill in what the lighter noise shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.stage import Stage
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.objectives.base import Example, Noise, Objective
from stackwise.objectives.head import context_of


class Aim(NamedTuple):
    """`lighter`: a micro-batch under the noise of the stacks behind the new one. `factor`: of `distance`, beside a loss
    that is still to be divided by the weight of the step."""

    lighter: Example
    factor: Tensor


@dataclass(frozen=True)
class Consistency:
    """`blocks` of the new stack, the first in forward order; `noise` of the stacks behind it."""

    weight: float
    blocks: int
    noise: Noise | None

    def aims(
        self,
        objective: Objective,
        batches: Sequence[Mapping[str, Tensor]],
        step_weight: Tensor,
        device: torch.device,
    ) -> list[Aim]:
        """Of the micro-batches of a step whose losses are divided by `step_weight`."""
        lighter = [objective.corrupt(batch, self.noise).to(device) for batch in batches]
        factor = self.weight * step_weight / torch.stack([positions(example) for example in lighter]).sum()
        return [Aim(example, factor) for example in lighter]


def consistency_of(
    config: StackWiseConfig, stages: Sequence[Stage], index: int, spec: RackSpec, units: Set[str]
) -> Consistency | None:
    """What stage `index`, which trains `units` of a rack that has grown already (`spec`), is held to; null: nothing.

    It is where the stack that was prepended last trains and the stacks behind it do not.
    """
    weight = config.training.progressive.consistency_weight
    grown = [i for i, stage in enumerate(stages[: index + 1]) if stage.grow is not None]
    if not weight or not grown or not grown[-1] or stages[index].alone is not None:
        return None
    growth, new = stages[grown[-1]].grow, spec.stacks[0]
    trained = {unit.partition(":")[2].partition(".")[0] for unit in units if ":" in unit}
    if growth is None or growth.op != "prepend" or trained != {new.uid}:
        return None
    return Consistency(weight, len(new.blocks), stages[grown[-1] - 1].noise)


def positions(example: Example) -> Tensor:
    """How many positions are no padding."""
    mask = example.attention_mask
    return torch.ones_like(example.input_ids).sum() if mask is None else mask.sum()


def distance(rack: Rack, objective: Objective, hidden_BTD: Tensor, lighter: Example) -> Tensor:
    """Sum over the positions that are no padding of the mean square over the width; a scalar."""
    with torch.no_grad(), nullcontext() if rack.dropout is None else eval_mode(rack.dropout):
        aim_BTD = rack.embed(lighter.input_ids, context_of(rack, lighter))
        aim_BTD = objective.embedded(aim_BTD, lighter)
    square_BT = (_unit(hidden_BTD, rack) - _unit(aim_BTD, rack)).square().mean(-1)
    return (square_BT if lighter.attention_mask is None else square_BT * lighter.attention_mask).sum()


def _unit(x_BTD: Tensor, rack: Rack) -> Tensor:
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    return F.rms_norm(x_BTD.to(wide), x_BTD.shape[-1:], eps=rack.spec.norm_eps)
