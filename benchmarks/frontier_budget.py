"""Budgets of the frontier: how long a config has to train to cost a given number of FLOPs or tokens.

Everything is computed from the stages of the config before anything runs, and the run checks it afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.costs import stage_tokens
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Stage
from stackwise.data.loader import permutation
from stackwise.model.flops import block_forward_flops, rows_of, step_flops
from stackwise.model.spec import RackSpec

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

    low, high = 1, 2
    while of(high) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) <= target else (low, middle)
    return {**keys, steps_key: low}


def tokens_of(config: StackWiseConfig) -> int:
    """Tokens that a run trains on, repetitions included."""
    return sum(stage.steps * stage_tokens(config, stage) for stage in stages(config))


def flops_of(config: StackWiseConfig, rows: int) -> float:
    """FLOP of a run over `rows` different rows, those that fill the activation store included."""
    training, progressive = config.training, config.training.progressive
    listed = stages(config)
    specs = stage_specs(config, listed, first_spec(config, listed), "fp32")
    total, stored = 0.0, _Visits(rows, training.seed)
    recompute, streams = training.gradient_checkpointing, progressive.trunk_residency == "streamed"
    for stage, spec in zip(listed, specs, strict=True):
        seq_len = stage.seq_len or training.seq_len
        prefix = leading_blocks(spec, stage)
        cached = prefix if progressive.cache_activations is True else 0
        per_token = step_flops(
            spec,
            trained_units(spec, stage),
            seq_len,
            recompute=recompute or training.residency == "streamed",
            recompute_frozen=recompute or streams,
            cached=cached,
            alone=stage.alone,
        )
        tokens = stage.steps * stage_tokens(config, stage)
        visited = stored.take(tokens // seq_len)
        total += tokens * per_token
        if cached:
            forward = [block_forward_flops(block, seq_len) * seq_len for block in spec.blocks]
            for first, count in stored.fill(visited, cached):
                total += count * sum(forward[first:cached])
    return total


def leading_blocks(spec: RackSpec, stage: Stage) -> int:
    """Blocks in front of everything that a stage trains."""
    units = trained_units(spec, stage)
    if "embedding" in units:
        return 0
    works = list(rows_of(spec, units, stage.alone))
    return next((i for i, work in enumerate(works) if work.trains or work.learning), len(works))


class _Visits:
    """Which rows a run visits, and which of them it finds in a store."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.cursor = rows, seed, 0
        self.kept: dict[int, np.ndarray] = {}  # the stores, in memory: boundary -> which rows they hold

    def take(self, count: int) -> np.ndarray:
        """bool [rows]: which are among the next `count` of the stream."""
        seen = np.zeros(self.rows, bool)
        for ids in self._epochs(self.cursor, self.cursor + count):
            seen[ids] = True
        self.cursor += count
        return seen

    def _epochs(self, start: int, stop: int) -> Iterator[np.ndarray]:
        if stop - start >= 2 * self.rows:  # one whole epoch is among them
            start = stop = 0
            yield np.arange(self.rows)
        while start < stop:
            epoch, place = divmod(start, self.rows)
            end = min(self.rows, place + stop - start)
            yield permutation(self.rows, self.seed, epoch)[place:end]
            start += end - place

    def fill(self, visited: np.ndarray, boundary: int) -> list[tuple[int, int]]:
        """(first block to run, rows) for rows that come for the first time at this boundary.

        Afterwards the store of this boundary and the next one below it are kept, as in a run, and rows that came from
        below have moved up.
        """
        nothing = np.zeros(self.rows, bool)
        lower = max((b for b in self.kept if b < boundary), default=0)
        held, below = self.kept.get(boundary, nothing), self.kept.get(lower, nothing)
        missing = visited & ~held
        moved = missing & below
        self.kept = {boundary: held | visited, **({lower: below & ~moved} if lower else {})}
        return [(lower, int(moved.sum())), (0, int((missing & ~below).sum()))]


def batch_for(keys: Keys, steps: int, target: float, rows: int) -> Keys:
    """The keys with the batch size that makes `steps` steps cost about `target` FLOP."""
    one = flops_of(config_of({**keys, "training.batch_size": 1, "training.max_steps": steps}), rows)
    return {**keys, "training.batch_size": max(1, math.floor(target / one))}
