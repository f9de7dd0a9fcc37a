"""Which sets a stack gets, from the settings: rank, alpha and dropout by the order in which stacks were built.

simplified             every stack alike
progressive, b = 0, 1, 2 ...
    constant           r
    increasing         r 2^b
    decreasing         max(1, r / 2^b)
    linear             r + 8 b, alpha: alpha + 16 b
variable               from a table by b; a stack that has no row gets the rank of the others, and a warning
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from stackwise.model.spec import AdapterSpec

if TYPE_CHECKING:
    from stackwise.adapters.settings import AdapterKeys

STACK, TRUNK = "stack", "trunk"
"""The set that a stack is born with, and the one that is added when a younger stack arrives."""


class Size(NamedTuple):
    """How large a set is and how strongly it acts."""

    rank: int
    alpha: float
    dropout: float


def rank_of(keys: AdapterKeys, build_index: int, rank: int | None = None, alpha: float | None = None) -> Size:
    """Rank, alpha and dropout of the set `stack` of the stack with this build index; what is given explicitly wins."""
    size = Size(keys.qlora_rank, keys.qlora_alpha, keys.qlora_dropout)
    if keys.qlora_strategy == "progressive":
        size = size._replace(
            rank=int(_along(keys.qlora_rank_pattern, size.rank, build_index, 8)),
            alpha=float(_along(keys.qlora_alpha_pattern, size.alpha, build_index, 16)),
        )
    elif keys.qlora_strategy == "variable":
        row = keys.qlora_configs.get(build_index)
        if row is not None:
            size = Size(row.rank, row.alpha, size.dropout if row.dropout is None else row.dropout)
        elif rank is None:
            warnings.warn(
                f"training.progressive.qlora_configs has no entry {build_index}: the stack with that build index gets "
                f"rank {size.rank} and alpha {size.alpha:g}",
                stacklevel=2,
            )
    return size._replace(
        rank=size.rank if rank is None else rank, alpha=size.alpha if alpha is None else alpha
    )


def set_of(
    keys: AdapterKeys, name: str, build_index: int, rank: int | None = None, alpha: float | None = None
) -> AdapterSpec:
    """The set `stack` or `trunk` of the stack with this build index."""
    if name == TRUNK:
        size = Size(
            rank or keys.progressive_qlora_rank, alpha or keys.progressive_qlora_alpha, keys.qlora_dropout
        )
    else:
        size = rank_of(keys, build_index, rank, alpha)
    targets = keys.qlora_target_modules
    return AdapterSpec(
        name,
        keys.qlora_method,
        size.rank,
        size.alpha,
        size.dropout,
        (targets,) if isinstance(targets, str) else tuple(targets),
        keys.qlora_use_rslora,
    )


def _along(pattern: str, start: float, build_index: int, step: int) -> float:
    if pattern == "increasing":
        return start * 2**build_index
    if pattern == "decreasing":
        return max(1, start / 2**build_index)
    return start + step * build_index if pattern == "linear" else start
