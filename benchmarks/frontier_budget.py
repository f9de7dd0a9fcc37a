"""Budgets of the frontier: how long a config has to train to cost a given number of FLOPs or tokens.

Everything is computed from the stages of the config before anything runs, and the run checks it afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from stackwise.config.root import StackWiseConfig
from stackwise.planning.budget import largest_within, run_flops

Keys = dict[str, Any]


def config_of(keys: Keys) -> StackWiseConfig:
    """A config from dotted keys; a number in a path is a place in a list of sections."""
    data: dict[str, Any] = {}
    for path, value in keys.items():
        *sections, name = path.split(".")
        level: Any = data
        for section, following in zip(sections, [*sections[1:], name], strict=True):
            fresh: Any = [] if following.isdigit() else {}
            if isinstance(level, list):
                if int(section) == len(level):
                    level.append(fresh)
                level = level[int(section)]
            else:
                level = level.setdefault(section, fresh)
        level[name] = copy.deepcopy(value)
    config = StackWiseConfig.from_dict(data)
    config.validate()
    return config


def fit(keys: Keys, steps_key: str, target: float, cost: Callable[[StackWiseConfig], float]) -> Keys:
    """The keys with the largest budget that costs at most `target`, or 1 step where even that costs more.

    `steps_key`: the key that holds the budget in optimizer steps. `cost` must rise with it.
    """

    def of(steps: int) -> float:
        return cost(config_of({**keys, steps_key: steps}))

    return {**keys, steps_key: largest_within(of, target)}


def batch_for(keys: Keys, steps: int, target: float, rows: int) -> Keys:
    """The keys with the batch size that makes `steps` steps cost about `target` FLOP."""
    one = run_flops(config_of({**keys, "training.batch_size": 1, "training.max_steps": steps}), rows)
    return {**keys, "training.batch_size": max(1, math.floor(target / one))}
