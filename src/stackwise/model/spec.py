"""Descriptions of a Rack: plain, immutable data from which modules are built and counted.

Growth, planning and checkpoints work on these; no torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stackwise.config.errors import did_you_mean
from stackwise.model.block_spec import BlockSpec
from stackwise.model.registry import POSITION_LAYERS

ADAPTER_METHODS = ("lora", "dora", "mora", "bottleneck")


@dataclass(frozen=True)
class AdapterSpec:
    """A named set of adapters on the linear layers of a stack. Wrong values are ValueErrors.

    `targets`: all-linear, names of layers, or regular expressions. `rank` is the width of a bottleneck.
    """

    name: str
    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.name):
            yield f"the name of an adapter set is made of letters, digits, _ and -, got {self.name!r}"
        if self.method not in ADAPTER_METHODS:
            close = did_you_mean(self.method, ADAPTER_METHODS)
            yield f"unknown adapter method {self.method!r}; known: {', '.join(ADAPTER_METHODS)}" + (
                f"; {close}" if close else ""
            )
        if self.rank < 1:
            yield f"the rank of an adapter set must be at least 1, got {self.rank}"
        if not self.alpha > 0:
            yield f"the alpha of an adapter set must be above 0, got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield f"the dropout of an adapter set must be in [0, 1), got {self.dropout}"
        if not self.targets:
            yield "an adapter set needs targets: all-linear, names of layers, or regular expressions"


@dataclass(frozen=True)
class StackSpec:
    """Blocks in forward order under an identity that never changes.

    `weight_format`: how the matrices are stored (fp32 while the stack trains, see `stackwise.precision.formats`).
    `adapters` are the sets attached to the stack, in the order of their making. `compute_dtype` and `frozen_format`
    (how to store it once it freezes) null are the run's. `trained`: its weights have learned something, themselves or
    as those they were copied from. `adapters_only`: its matrices never train, the set `stack` does in their place.
    `spectral`: it computes with its matrices divided by their largest singular values (`model.spectral`). `own_io`: it
    has an embedding, a norm and a head of its own, between which it runs alone.
    """

    uid: str
    blocks: tuple[BlockSpec, ...]
    build_index: int = 0
    weight_format: str = "fp32"
    compute_dtype: str | None = None
    adapters: tuple[AdapterSpec, ...] = ()
    frozen_format: str | None = None
    trained: bool = False
    adapters_only: bool = False
    spectral: bool = False
    own_io: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StackSpec:
        """What `dataclasses.asdict` gave, read again."""
        blocks = tuple(BlockSpec.create(row) for row in data["blocks"])
        adapters = tuple(
            AdapterSpec(**{**row, "targets": tuple(row["targets"])}) for row in data.get("adapters", ())
        )
        return cls(**{**data, "blocks": blocks, "adapters": adapters})


TIME_ENCODINGS = ("sinusoidal", "learned")
TIME_CONDITIONINGS = ("add", "adaln")


@dataclass(frozen=True)
class TimeSpec:
    """How a rack is told the time of the noise; see `stackwise.model.time`. Wrong values are ValueErrors.

    `width` of the features, `steps` of the horizon (rows of a learned table).
    """

    width: int
    steps: int
    encoding: str = "sinusoidal"
    conditioning: str = "add"

    def __post_init__(self) -> None:
        for name in ("width", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the time input must be at least 1, got {getattr(self, name)}")
        for name, known in (("encoding", TIME_ENCODINGS), ("conditioning", TIME_CONDITIONINGS)):
            value = getattr(self, name)
            if value not in known:
                close = did_you_mean(value, known)
                raise ValueError(
                    f"{name} of the time input must be {' or '.join(known)}, got {value!r}"
                    + (f"; {close}" if close else "")
                )


@dataclass(frozen=True)
class RackSpec:
    """embedding -> stacks -> tail -> norm -> head.

    `tail` are the global head blocks: they sit between the last stack and the final norm and train in every stage of
    an append run. `planned_blocks` is the depth the run ends with; initial scales follow it. `tied`: the
    head is the embedding's matrix. `time`: how it is told the time of the noise; null: it is not. `embedding_norm`:
    true is unit rms, "learned" the model's norm behind all that is added. `embedding_width` 0 is `d_model`,
    `adapter_hidden` 0 a linear adapter where that differs, and the first `frozen_rows` tokens of the table never
    train; see `model.embedding`. `tie_adapter` and all that begins
    with `head`: see `model.own_io`; `head_rank` 0 is a full matrix. Wrong values are ValueErrors.
    """

    vocab_size: int
    d_model: int
    stacks: tuple[StackSpec, ...]
    tail: tuple[BlockSpec, ...] = ()
    max_seq_len: int = 2048
    positions: str = "rope"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    tied: bool = False
    dropout: float = 0.0
    planned_blocks: int = 0
    embedding_norm: bool | str = False
    time: TimeSpec | None = None
    token_types: int = 0
    embedding_scale: float = 1.0
    embedding_width: int = 0
    adapter_hidden: int = 0
    frozen_rows: int = 0
    tie_adapter: str = "linear"
    head_rank: int = 0
    head_transform: bool = False
    head_bias: bool = False
    logit_softcap: float | None = None
    final_norm: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {self.vocab_size}")
        if self.positions not in POSITION_LAYERS.names():
            POSITION_LAYERS.get(self.positions)
        uids = [stack.uid for stack in self.stacks]
        if len(set(uids)) != len(uids):
            raise ValueError(f"stack uids must be unique, got {uids}")
        for block in self.blocks:
            if block.d_model != self.d_model:
                raise ValueError(f"every block must be {self.d_model} wide, got {block.d_model}")
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.frozen_rows <= self.vocab_size:
            yield f"frozen_rows must be from 0 to vocab_size {self.vocab_size}, got {self.frozen_rows}"
        for name in ("token_types", "embedding_width", "adapter_hidden", "head_rank"):
            if getattr(self, name) < 0:
                yield f"{name} must be at least 0, got {getattr(self, name)}"
        if self.embedding_norm not in (False, True, "learned"):
            yield f"embedding_norm must be false, true or 'learned', got {self.embedding_norm!r}"
        if self.tie_adapter not in ("linear", "transpose"):
            yield f"tie_adapter must be 'linear' or 'transpose', got {self.tie_adapter!r}"
        if not self.embedding_scale > 0:
            yield f"embedding_scale must be above 0, got {self.embedding_scale}"
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            yield f"logit_softcap must be above 0, got {self.logit_softcap}"
        if self.tied and self.head_rank:
            yield "a tied head has the rank of the table: set embedding_width instead of head_rank, or untie"
        if self.tied and self.tie_adapter == "transpose" and self.adapter_hidden:
            yield "an MLP has no transpose: tie_adapter 'transpose' needs a linear adapter (adapter_hidden 0)"

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in forward order, the tail last."""
        return tuple(b for stack in self.stacks for b in stack.blocks) + self.tail

    @property
    def is_causal(self) -> bool:
        return all(block.causal for block in self.blocks)

    def fits(self, n_tokens: int) -> bool:
        """Whether a row of so many tokens can run. Where all blocks have ALiBi there is no longest row."""
        endless = self.positions == "alibi" and all(block.alibi for block in self.blocks)
        return endless or n_tokens <= self.max_seq_len

    def too_long(self, n_tokens: int) -> str:
        """Why a row of so many tokens is refused, and the way out."""
        message = f"{n_tokens} tokens are more than max_seq_len = {self.max_seq_len}; shorten the input, or build the "
        message += f"model with model.max_seq_len={n_tokens}"
        if self.positions == "rope" and all(block.rope_scaling is None for block in self.blocks):
            factor = -(-n_tokens // self.max_seq_len)
            message += (
                f". A model trained at {self.max_seq_len} tokens also needs its rotary positions scaled, such as by "
                f"model.rope_scaling={{type: yarn, factor: {factor}, original_max_seq_len: {self.max_seq_len}}}"
            )
        return message

    @property
    def has_bias(self) -> bool:
        """Whether what is around the blocks has biases: if any block has."""
        return any(block.bias for block in self.blocks)

    @property
    def table_width(self) -> int:
        """Width of the embedding's table."""
        return self.embedding_width or self.d_model

    @property
    def embedding_adapter(self) -> bool:
        """Whether something stands between table and model."""
        return bool(self.adapter_hidden) or self.table_width != self.d_model

    @property
    def table_trains(self) -> bool:
        """Whether any row of the embedding's table can train."""
        return self.frozen_rows < self.vocab_size

    @property
    def embedding_trains(self) -> bool:
        """Whether anything can train in front of the blocks."""
        around = self.embedding_adapter or self.token_types or self.time or self.embedding_norm == "learned"
        return self.table_trains or bool(around) or self.positions == "learned"

    @property
    def head_width(self) -> int:
        """Width of the head's matrix."""
        return self.table_width if self.tied else self.head_rank or self.d_model

    @property
    def head_adapter(self) -> bool:
        """Whether something stands between model and head."""
        return self.embedding_adapter if self.tied else bool(self.head_rank)

    @property
    def head_is_table(self) -> bool:
        """Whether the head has no parameter that is not the embedding's."""
        own_adapter = self.head_adapter and self.tie_adapter == "linear"
        return self.tied and not (own_adapter or self.head_transform or self.head_bias)

    def with_stacks(self, stacks: Sequence[StackSpec]) -> RackSpec:
        return replace(self, stacks=tuple(stacks))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives back an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RackSpec:
        stacks = tuple(StackSpec.from_dict(stack) for stack in data["stacks"])
        tail = tuple(BlockSpec.create(row) for row in data["tail"])
        time = TimeSpec(**data["time"]) if data.get("time") else None
        return cls(**{**data, "stacks": stacks, "tail": tail, "time": time})
