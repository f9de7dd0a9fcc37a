"""Budgets: what a whole run costs, counted before it runs, and how long a config trains for given FLOPs or tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from stackwise.config.objective_rules import scored_share
from stackwise.config.resolve import resolve
from stackwise.config.rules import program_of
from stackwise.curriculum.costs import stage_tokens
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import trained_units
from stackwise.data.loader import permutation
from stackwise.model.flops import block_forward_flops, rows_of, step_flops
from stackwise.planning.compare import with_changes
from stackwise.planning.plan import stored_blocks

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.curriculum.stage import Stage
    from stackwise.model.spec import RackSpec
    from stackwise.planning.facts import Data

__all__ = [
    "Axis",
    "cost_of",
    "largest_within",
    "leading_blocks",
    "matched",
    "nearest",
    "run_flops",
    "run_tokens",
    "steps_of",
]

Axis = Literal["flops", "tokens"]


def run_tokens(config: StackWiseConfig, steps_per_epoch: int | None = None) -> int:
    """Tokens that a run trains on, repetitions included."""
    return sum(stage.steps * stage_tokens(config, stage) for stage in stages(config, steps_per_epoch))


def run_flops(config: StackWiseConfig, rows: int, steps_per_epoch: int | None = None) -> float:
    """FLOP of a run over `rows` different rows, as the run counts them, those that fill activation stores included.

    Which stages read their frozen prefix from a store is decided as the run decides it. Two things are known to the
    run alone, which may then differ by a little: rows that are stored once per draw of a masking objective, and stores
    that do not have room for all rows. Raises ValueError without a vocabulary.
    """
    training, progressive = config.training, config.training.progressive
    listed = stages(config, steps_per_epoch)
    specs = stage_specs(config, listed, first_spec(config, listed), "fp32")
    total, stored = 0.0, _Visits(rows, training.seed)
    recompute = training.gradient_checkpointing
    read = stored_blocks(config, listed, specs, rows)
    for stage, spec, cached in zip(listed, specs, read, strict=True):
        seq_len = stage.seq_len or training.seq_len
        per_token = step_flops(
            spec,
            trained_units(spec, stage),
            seq_len,
            recompute=recompute or training.residency == "streamed",
            recompute_frozen=recompute or progressive.trunk_residency != "resident",
            cached=cached,
            alone=stage.alone,
            scored=scored_share(config, stage.noise),
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


def steps_of(config: StackWiseConfig, data: Data) -> int:
    """Optimizer steps of a config's run, all stages together."""
    return sum(stage.steps for stage in stages(_resolved(config, data), data.steps_per_epoch))


def cost_of(config: StackWiseConfig, axis: Axis, data: Data) -> float:
    """FLOP or tokens of a config's run on data that `facts.data_facts` has looked at."""
    assert data.n_rows is not None
    resolved = _resolved(config, data)
    if axis == "tokens":
        return float(run_tokens(resolved, data.steps_per_epoch))
    return run_flops(resolved, data.n_rows, data.steps_per_epoch)


def _resolved(config: StackWiseConfig, data: Data) -> StackWiseConfig:
    return resolve(config, vocab_size=data.vocab_size, mask_id=data.mask_id)[0]


def matched(config: StackWiseConfig, axis: Axis, target: float, data: Data) -> StackWiseConfig:
    """A copy of a config whose run costs as nearly `target` FLOP or tokens as its steps allow.

    What is set is what the curriculum reads: `training.max_steps`, the steps of one stack; `cycle_steps` where that is
    given; of hand-written stages all, in proportion.
    """

    def of(steps: int) -> StackWiseConfig:
        return _with_steps(config, steps, data.steps_per_epoch)

    return of(nearest(lambda steps: cost_of(of(steps), axis, data), target))


def nearest(cost: Callable[[int], float], target: float) -> int:
    """The n >= 1 whose cost is nearest to `target`; `cost` must rise with n."""
    low = largest_within(cost, target)
    return low if target - cost(low) < cost(low + 1) - target else low + 1


def largest_within(cost: Callable[[int], float], target: float) -> int:
    """The largest n whose cost is at most `target`, or 1 where even that costs more; `cost` must rise with n."""
    low, high = 1, 2
    while cost(high) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return low


def _with_steps(config: StackWiseConfig, steps: int, steps_per_epoch: int | None) -> StackWiseConfig:
    training = config.training
    if training.stages is not None:
        planned = [stage.steps for stage in stages(config, steps_per_epoch)]
        records = [
            {**record.model_dump(mode="json"), "epochs": None, "max_tokens": None, "max_steps": share}
            for record, share in zip(training.stages, _in_proportion(planned, steps), strict=True)
        ]
        return with_changes(config, {"training.stages": records})
    if program_of(config) == "cyclic" and training.progressive.cycle_steps is not None:
        return with_changes(config, {"training.progressive.cycle_steps": steps})
    return with_changes(config, {"training.max_steps": steps})


def _in_proportion(planned: list[int], steps: int) -> list[int]:
    """About `steps` steps in all, at least one each."""
    return [max(1, round(share * steps / sum(planned))) for share in planned]


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
