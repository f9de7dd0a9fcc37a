"""The curricula side by side: the same model, the same tokens, the same FLOPs; and the cheapest that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stackwise.config.errors import ConfigError
from stackwise.config.rules import stacks_at_the_end
from stackwise.planning.plan import plan_on
from stackwise.planning.report import Plan

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

Changes = dict[str, Any]
"""Dotted key -> value."""

_APPEND: Changes = {"building_mode": "append", "joint_tuning": False, "cache_activations": False}
CURRICULA: dict[str, Changes] = {
    "end to end": {"enabled": False},
    "append": _APPEND,
    "append, trunk stored": {**_APPEND, "cache_activations": True},
    "append, trunk streamed": {**_APPEND, "trunk_residency": "streamed"},
    "append, joint phase": {**_APPEND, "joint_tuning": True},
    "prepend": {"building_mode": "prepend"},
    "grow": {"building_mode": "grow"},
    "cyclic": {"building_mode": "cyclic"},
    "independent": {"building_mode": "independent"},
}
"""Name -> keys of `training.progressive`."""

SHARED = {
    "enabled": True,
    "global_head_blocks": 0,
    "stage_weights": None,
    "growth_layers": None,
    "train_stacks": None,
    "joint_tuning": "auto",
    "trunk_residency": "resident",
}
"""Keys of `training.progressive` that are the same in all rows, unless a row says otherwise."""


@dataclass(frozen=True)
class Row:
    """A curriculum. `problem`: why this config cannot run it; the plan is null then.

    `flops` and `hours` are those of the tokens that all rows are reckoned with, `tokens` those that the FLOPs of the
    config's own run would pay for. `trained_share`: of all tokens, those that a block trains on, on average.
    """

    name: str
    plan: Plan | None = None
    problem: str = ""
    flops: float = 0.0
    hours: float = 0.0
    tokens: float = 0.0

    @property
    def trained_share(self) -> float:
        if self.plan is None:
            return 0.0
        blocks = max(stage.total_blocks for stage in self.plan.stages)
        trained = sum(stage.tokens * stage.trained_blocks for stage in self.plan.stages)
        return trained / (self.plan.total_tokens * blocks)

    def to_dict(self) -> dict[str, Any]:
        told = {"name": self.name, "problem": self.problem}
        if self.plan is None:
            return told
        facts = {
            "flops": self.flops,
            "hours": self.hours,
            "tokens": self.tokens,
            "trained_share": self.trained_share,
        }
        largest = {
            "peak_bytes": self.plan.peak_bytes,
            "fits": self.plan.fits,
            "largest": self.plan.largest.name,
        }
        elsewhere = {"host_bytes": self.plan.host_bytes, "disk_bytes": self.plan.disk_bytes}
        return {**told, **facts, **largest, **elsewhere, "stages": len(self.plan.stages)}


@dataclass(frozen=True)
class Comparison:
    """All rows; `tokens` and `flops` of the config's own run, which the rows are brought to."""

    rows: list[Row]
    tokens: int
    flops: float

    @property
    def cheapest(self) -> Row | None:
        """Of those that fit the one that takes the fewest FLOPs for the same tokens; null where none fits."""
        fitting = [row for row in self.rows if row.plan is not None and row.plan.fits != "no"]
        return min(fitting, key=lambda row: row.flops, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "rows": [row.to_dict() for row in self.rows],
            "cheapest": self.cheapest.name if self.cheapest else None,
        }


def compare(config: StackWiseConfig, own: Plan) -> Comparison:
    """Plan every curriculum for the model of a config whose own plan is `own`, on the same device.

    Blocks at the head that only append has, hand-written stages and uneven budgets are left out, so that all rows
    train the same model.
    """
    rows = [_row(config, name, changes, own) for name, changes in CURRICULA.items()]
    return Comparison(rows, own.total_tokens, own.total_flops)


def _row(config: StackWiseConfig, name: str, changes: Changes, own: Plan) -> Row:
    from stackwise.config.embedding_rules import ties

    model = {"model.tie_embeddings": ties(config)}
    shared = {"training.stages": None, "training.unit": "stack", **model}
    keys = {**SHARED, "target_stacks": stacks_at_the_end(config), **changes}
    if not keys["enabled"]:
        shared["model.architecture.n_stacks"] = keys["target_stacks"]
    try:
        changed = with_changes(
            config, {**shared, **{f"training.progressive.{k}": v for k, v in keys.items()}}
        )
        laid_out = plan_on(changed, own.device, own.rate, own.corpus)
    except ConfigError as error:
        return Row(name, problem="; ".join(problem.message for problem in error.problems))
    per_token = laid_out.total_flops / laid_out.total_tokens
    flops = per_token * own.total_tokens
    return Row(name, laid_out, "", flops, flops / own.rate / 3600, own.total_flops / per_token)


def with_changes(config: StackWiseConfig, changes: Changes) -> StackWiseConfig:
    """A valid copy of a config with other values. What does not go together is a ConfigError."""
    from stackwise.config.root import StackWiseConfig

    settings = config.to_dict()
    for key, value in changes.items():
        *sections, name = key.split(".")
        level = settings
        for section in sections:
            level = level[section]
        level[name] = value
    changed = StackWiseConfig.from_dict(settings)
    changed.validate()
    return changed


def fitted(config: StackWiseConfig, changes: Changes, own: Plan, only: str | None = None) -> Plan | None:
    """The plan of a config with other values, where `own` is its plan; null where they do not go together.

    `only`: see `plan_on`.
    """
    try:
        return plan_on(with_changes(config, changes), own.device, own.rate, own.corpus, only)
    except ConfigError:
        return None
