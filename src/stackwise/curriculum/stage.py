"""A Stage: one leg of a training run. It maps a checkpoint to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stackwise.model.block_spec import BlockSpec

OPS = ("append", "prepend", "duplicate")
INITS = ("copy", "zero", "random")
STATES = ("reset", "carry", "copy")


@dataclass(frozen=True)
class Growth:
    """What is added before the stage trains; see `curriculum.growth`.

    append, prepend: one stack of `n_blocks` blocks next to the head or the embedding, started by `init` (copy, zero,
    random). `blocks` null: of the same kind as its neighbour's.
    duplicate: the whole sequence of stacks `factor` times, or block i of the new rack a copy of block `layers[i]` of
    the old one; blocks that do not form a whole old stack are cut into stacks of `n_blocks`.
    """

    op: str
    n_blocks: int = 0
    init: str = "copy"
    factor: int = 2
    layers: tuple[int, ...] | None = None
    blocks: tuple[BlockSpec, ...] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Growth:
        layers, blocks = data.get("layers"), data.get("blocks")
        return cls(
            **{
                **data,
                "layers": None if layers is None else tuple(layers),
                "blocks": None if blocks is None else tuple(BlockSpec.create(row) for row in blocks),
            }
        )


@dataclass(frozen=True)
class Stage:
    """What grows, what trains, at which rate, for how long.

    `n_stacks` stacks are there once it has grown. `trains` holds selectors: all, new, trunk, embedding, tail, norm,
    head, stack:<position>, block:<position>.<i>, lora:<set>. Peak rates: `lr` of the newest stack, `trunk_lr` of the
    others, `io_lr` of embedding, tail, norm and head; null is the optimizer's. `adapter_lr` of adapters; null is
    `qlora_lr`.
    `schedule` (start, total): the rate follows a schedule of `total` steps from its step `start` on, so that several
    stages share one; null is a schedule of the stage's own.
    `optimizer_state`: what happens to the moments at the start (reset, carry, copy; see `training.optim.carried`).
    `alone`: embedding -> only the stack with this build index -> norm -> head.
    `data_start`: optimizer steps into the stream of samples at which the stage starts; null goes on where the last
    one ended. `noise`: range of the share of corrupted tokens; null is the objective's. `eval_noise`: the range that
    held-out text is scored on; null is `noise`. `seq_len`, `batch_size`, `precision` (of the stacks that join) and
    `cache` null: those of the run.
    """

    name: str
    n_stacks: int
    trains: tuple[str, ...]
    steps: int
    grow: Growth | None = None
    lr: float | None = None
    trunk_lr: float | None = None
    io_lr: float | None = None
    adapter_lr: float | None = None
    warmup_steps: int = 0
    schedule: tuple[int, int] | None = None
    optimizer_state: str = "reset"
    alone: int | None = None
    data_start: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    precision: str | None = None
    cache: Literal["auto"] | bool | None = None
    noise: tuple[float, float] | None = None
    eval_noise: tuple[float, float] | None = None

    @property
    def scored_noise(self) -> tuple[float, float] | None:
        """The range of the share of corrupted tokens on which held-out text is scored."""
        return self.noise if self.eval_noise is None else self.eval_noise

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `Stage.from_dict` gives back an equal object."""
        return asdict(self)

    def to_record(self) -> dict[str, Any]:
        """The stage as it is written under `training.stages`; what is null is left out."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        grow, trains, steps = given.pop("grow", None), given.pop("trains"), given.pop("steps")
        record = {"name": given.pop("name"), "train": list(trains), "max_steps": steps}
        if grow is not None:
            record["grow"] = {name: value for name, value in grow.items() if value is not None}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in {**record, **given}.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        grow, schedule = data.get("grow"), data.get("schedule")
        return cls(
            **{
                **data,
                "trains": tuple(data["trains"]),
                "grow": None if grow is None else Growth.from_dict(grow),
                "schedule": None if schedule is None else (int(schedule[0]), int(schedule[1])),
                **{name: tuple(data[name]) for name in ("noise", "eval_noise") if data.get(name) is not None},
            }
        )
