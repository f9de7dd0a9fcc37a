"""Keys of stored trunk outputs that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.residency_rules import freezes_blocks
from stackwise.config.rules import program_of, rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def has_frozen_prefix(config: StackWiseConfig) -> bool:
    """Whether frozen blocks ever lie before what trains."""
    return freezes_blocks(config) and program_of(config) not in ("prepend", "independent")


def _never_stores(config: StackWiseConfig) -> bool:
    choices = [config.training.progressive.cache_activations]
    choices += [stage.cache for stage in config.training.stages or () if stage.cache is not None]
    return has_frozen_prefix(config) and not any(choices)


def _needs_no_folder(config: StackWiseConfig) -> bool:
    return config.training.progressive.trunk_residency != "mapped"


def _stages_say_it(config: StackWiseConfig) -> bool:
    listed = config.training.stages
    return listed is not None and all(stage.cache is not None for stage in listed)


@rule("data.bucketing", "training.progressive.cache_activations", "training.stages")
def _stored_outputs_have_one_width(config: StackWiseConfig) -> list[Problem]:
    if not config.data.bucketing or config.data.packing:
        return []
    choices: dict[str, object] = {
        "training.progressive.cache_activations": config.training.progressive.cache_activations
    }
    for i, stage in enumerate(config.training.stages or ()):
        choices[f"training.stages.{i}.cache"] = stage.cache
    message = "stored outputs have one width, and under data.bucketing batches have widths of their own"
    asked = [key for key, value in choices.items() if value is True or ("stages" in key and value == "auto")]
    return [Problem(key, message, choices[key], "false, or data.bucketing: false") for key in asked]


_OFF = "training.progressive.cache_activations is false"
_NO_PREFIX = "no frozen block lies before what trains"

INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    *(
        (f"training.progressive.{key}", lambda c: not has_frozen_prefix(c), _NO_PREFIX)
        for key in ("cache_activations", "cache_max_bytes", "cache_ram_bytes", "cache_dtype")
    ),
    (
        "training.progressive.cache_activations",
        _stages_say_it,
        "every stage says by itself whether it stores outputs",
    ),
    *(
        (f"training.progressive.{key}", _never_stores, _OFF)
        for key in ("cache_max_bytes", "cache_ram_bytes", "cache_dtype")
    ),
    (
        "training.progressive.cache_dir",
        lambda c: not has_frozen_prefix(c) and _needs_no_folder(c),
        _NO_PREFIX,
    ),
    ("training.progressive.cache_dir", lambda c: _never_stores(c) and _needs_no_folder(c), _OFF),
]
