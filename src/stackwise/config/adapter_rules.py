"""Rules about adapters, and their keys that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

KEY = "training.progressive."


@rule(KEY + "progressive_qlora", KEY + "qlora_enabled")
def trunk_adapters_need_adapters(config: StackWiseConfig) -> Problem | None:
    progressive = config.training.progressive
    if progressive.qlora_enabled or not progressive.progressive_qlora:
        return None
    return Problem(
        KEY + "progressive_qlora",
        "adds a second adapter set, but training.progressive.qlora_enabled is false",
        True,
        hint="set training.progressive.qlora_enabled to true",
    )


@rule(KEY + "trunk_lora_mode", KEY + "progressive_qlora", KEY + "qlora_method")
def merged_sets_can_be_merged(config: StackWiseConfig) -> Problem | None:
    progressive = config.training.progressive
    merges = progressive.progressive_qlora and progressive.trunk_lora_mode == "merge"
    if not merges or progressive.qlora_method in ("lora", "mora"):
        return None
    why = {
        "bottleneck": "bottlenecks are not linear and cannot be folded into a weight",
        "dora": "the DoRA set `stack` depends on the weight into which the set `trunk` would be folded",
    }[progressive.qlora_method]
    return Problem(
        KEY + "trunk_lora_mode",
        why,
        "merge",
        "reuse",
        "or set training.progressive.qlora_method to lora or mora",
    )


def _off(config: StackWiseConfig) -> bool:
    return not config.training.progressive.qlora_enabled


def _no_trunk_sets(config: StackWiseConfig) -> bool:
    return not config.training.progressive.progressive_qlora


def _unscaled(config: StackWiseConfig) -> bool:
    return config.training.progressive.qlora_method in ("mora", "bottleneck")


def _strategy_is_not(name: str) -> Callable[[StackWiseConfig], bool]:
    return lambda config: config.training.progressive.qlora_strategy != name


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    *(
        (f"{KEY}qlora_{name}", _off, "training.progressive.qlora_enabled is false")
        for name in (
            *("rank", "alpha", "dropout", "lr", "method", "target_modules", "use_rslora"),
            *("strategy", "rank_pattern", "alpha_pattern", "configs"),
        )
    ),
    *(
        (
            KEY + name,
            _strategy_is_not("progressive"),
            "training.progressive.qlora_strategy is not progressive",
        )
        for name in ("qlora_rank_pattern", "qlora_alpha_pattern")
    ),
    (
        KEY + "qlora_configs",
        _strategy_is_not("variable"),
        "training.progressive.qlora_strategy is not variable",
    ),
    *(
        (KEY + name, _no_trunk_sets, "training.progressive.progressive_qlora is false")
        for name in ("progressive_qlora_rank", "progressive_qlora_alpha", "trunk_lora_mode")
    ),
    *(
        (KEY + name, _unscaled, "MoRA and bottlenecks are not scaled")
        for name in ("qlora_alpha", "qlora_alpha_pattern", "qlora_use_rslora", "progressive_qlora_alpha")
    ),
]
"""Key, when it has no effect, and why."""

ADVICE: list[tuple[Callable[[StackWiseConfig], bool], str]] = [
    (
        lambda c: (
            not _no_trunk_sets(c)
            and c.training.progressive.progressive_qlora_rank >= c.training.progressive.qlora_rank
        ),
        "training.progressive.progressive_qlora_rank is not below qlora_rank: a trunk that has been trained needs less "
        "room than what is added to it",
    ),
    (
        lambda c: any(
            all(what.startswith("lora:") for what in stage.train)
            and any(rate is not None for rate in (stage.lr, stage.trunk_lr, stage.io_lr))
            for stage in c.training.stages or ()
        ),
        "training.stages: a stage that trains adapters alone takes its rate from adapter_lr; lr, trunk_lr and io_lr have "
        "no effect there",
    ),
]
"""When, and what to say."""
