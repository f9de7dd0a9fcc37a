"""Which stacks answer for which rows: all for all, or where depth is time the owners of an interval of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stackwise.config.notes import tunes_jointly
from stackwise.config.objective_rules import time_of
from stackwise.objectives.base import Noise
from stackwise.objectives.denoiser import denoiser_of
from stackwise.objectives.depth import stack_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stackwise.config.root import StackWiseConfig
    from stackwise.model.rack import Rack

Span = tuple[int, int]


@dataclass(frozen=True)
class Route:
    """Rows of one range of noise, and what runs for them.

    `positions`: the stacks, from the embedding on, in series. `alone`: instead, side by side, each between the ends
    that it trained with (`Rack.io_of`), and of them only `owner` answers for the rows. `tail`: whether the tail runs
    before the final norm. `noise`: range of the share of hidden tokens, null: the objective's own.
    """

    name: str
    positions: tuple[int, ...]
    noise: Noise | None = None
    tail: bool = True
    alone: bool = False
    owner: int | None = None


def whole_route(rack: Rack) -> Route:
    """All stacks for all rows."""
    return Route("all rows", tuple(range(len(rack.stacks))))


def routes_of(rack: Rack, config: StackWiseConfig, special_ids: Sequence[int] = ()) -> list[Route]:
    """The routes of a rack that was trained by a resolved configuration, lightest noise first."""
    n = len(rack.stacks)
    if time_of(config) != "depth" or tunes_jointly(config):
        return [whole_route(rack)]
    noise, path = stack_noise(config, n), denoiser_of(rack, config, special_ids).path
    routes = []
    for distance in range(n):
        owner = n - 1 - distance
        low, high = noise.owns(distance)
        positions = {
            "suffix": tuple(range(owner, n)),
            "prefix": tuple(range(owner + 1)),
        }.get(path, tuple(range(n)))
        shares = f"{low:.3g} hidden" if low == high else f"{low:.3g} to {high:.3g} hidden"
        alone = path == "alone"
        routes.append(Route(shares, positions, (low, high), not alone, alone, owner))
    return routes


def spans_of(rack: Rack) -> list[Span]:
    """(first block, one past the last) of every stack, in forward order."""
    spans, start = [], 0
    for stack in rack.stacks:
        spans.append((start, start + len(stack.blocks)))
        start += len(stack.blocks)
    return spans
