"""What a config says to every curriculum: who trains when, in which pieces, and for how long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.objective_rules import time_of
from stackwise.config.rules import program_of, stacks_at_the_end
from stackwise.model.describe import tail_blocks
from stackwise.objectives.depth import stack_noise

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def embedding(config: StackWiseConfig, first: bool, auto: bool = False) -> list[str]:
    """The selector of the embedding where it trains. `auto`: what the curriculum does when the key says auto."""
    return ["embedding"] if _trains(config.training.progressive.train_embedding, first, auto) else []


def head(config: StackWiseConfig, first: bool, auto: bool = False) -> list[str]:
    """The selectors of norm and head where they train."""
    return ["norm", "head"] if _trains(config.training.progressive.train_head, first, auto) else []


def tail(config: StackWiseConfig) -> list[str]:
    """The selector of the global head blocks where there are any; they train at every stage."""
    return ["tail"] if tail_blocks(config) else []


def trunk(config: StackWiseConfig) -> list[str]:
    """What trains in older stacks while a new one does."""
    progressive = config.training.progressive
    if progressive.trunk_strategy == "trainable":
        return ["trunk"]
    return adapters(config) if progressive.trunk_strategy == "qlora" else []


def adapters(config: StackWiseConfig) -> list[str]:
    """The selectors of the adapter sets that a rack of two stacks and more carries."""
    return ["lora:stack", *(["lora:trunk"] if config.training.progressive.progressive_qlora else [])]


def everything(config: StackWiseConfig, count: int, first: bool) -> tuple[str, ...]:
    """All of a rack of `count` stacks, but for what is told never to train."""
    lookup, output = embedding(config, first, auto=True), head(config, first, auto=True)
    if lookup and output:
        return ("all",)
    return (*lookup, "new", *(["trunk"] if count > 1 else []), *tail(config), *output)


def pieces(
    config: StackWiseConfig, stack: str, position: int, n_blocks: int, steps: int
) -> Iterator[tuple[str, str, int]]:
    """(selector, name, steps) of the stages that train one stack: itself, or under `training.unit: block` its blocks."""
    if config.training.unit != "block":
        yield stack, "", steps
        return
    for i, part in enumerate(shares(steps, [1.0] * n_blocks)):
        yield f"block:{position}.{i}", f"block {i + 1}", part


def stack_budgets(config: StackWiseConfig, steps: int) -> list[int]:
    """Optimizer steps of every stack, in build order; what a shared start takes is not theirs."""
    count = stacks_at_the_end(config)
    weights = config.training.progressive.stage_weights or [1.0] * count
    if len(weights) != count:
        message = f"must have one number per stack ({count}), got {len(weights)}"
        raise ConfigError(Problem("training.progressive.stage_weights", message))
    return shares(steps * count - shared_start_steps(config, steps), weights)


def shared_start_steps(config: StackWiseConfig, steps: int) -> int:
    """Optimizer steps in which one stack trains for all independent ones."""
    if program_of(config) != "independent":
        return 0
    fraction = config.training.progressive.shared_start_fraction
    return max(1, round(fraction * steps * stacks_at_the_end(config))) if fraction else 0


def noise(config: StackWiseConfig, build_index: int) -> dict[str, Any]:
    """What a stack is trained on and scored on, as fields of a stage; empty where time is not depth."""
    if time_of(config) != "depth":
        return {}
    held = stack_noise(config, stacks_at_the_end(config))
    distance = held.distance(build_index)
    return {"noise": held.trains_on(distance), "eval_noise": held.owns(distance)}


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in proportion to `weights`, each at least 1."""
    return [max(1, round(total * weight / sum(weights))) for weight in weights]


def rewarmup(config: StackWiseConfig, steps: int) -> int:
    """Steps over which the learning rate rises again in a stage of `steps`."""
    return round(config.training.progressive.rewarmup_fraction * steps)


def _trains(choice: str, first: bool, auto: bool) -> bool:
    return {"always": True, "never": False, "first": first, "auto": auto or first}[choice]
