"""A Stage: one leg of a training run. It maps a checkpoint to a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Growth:
    """What is added before the stage trains. `init`: copy, zero or random; see `curriculum.growth`."""

    op: str
    n_blocks: int
    init: str


@dataclass(frozen=True)
class Stage:
    """What grows, what trains, at which rate, for how long.

    `trains` holds selectors: all, new, embedding, tail, norm, head, trunk, stack:<position>. `lr` null is the
    optimizer's rate; `trunk_lr` the rate of stacks that are not new. `optimizer_state`: what happens to the moments
    at the start of this stage (reset, carry, copy).
    """

    name: str
    n_stacks: int
    trains: tuple[str, ...]
    steps: int
    grow: Growth | None = None
    lr: float | None = None
    trunk_lr: float | None = None
    warmup_steps: int = 0
    optimizer_state: str = "reset"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `Stage.from_dict` gives back an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Stage:
        grow = Growth(**data["grow"]) if data["grow"] else None
        return cls(**{**data, "trains": tuple(data["trains"]), "grow": grow})
