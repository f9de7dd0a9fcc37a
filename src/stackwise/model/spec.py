"""Descriptions of a Rack: plain, immutable data from which modules are built and counted.

Growth, planning and checkpoints work on these; no torch is imported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from stackwise.config.errors import did_you_mean
from stackwise.model.registry import ATTENTIONS, FEED_FORWARDS, NORM_LAYERS, POSITION_LAYERS
from stackwise.model.settings import FFN_TYPES, default_d_ff


@dataclass(frozen=True)
class BlockSpec:
    """One transformer layer. `rope_theta` null = no rotation; `n_kv_heads` 0 and `d_ff` 0 take the defaults."""

    d_model: int
    n_heads: int
    n_kv_heads: int = 0
    d_ff: int = 0
    attention_type: str = "mha"
    causal: bool = False
    qk_norm: bool = False
    rope_theta: float | None = 10_000.0
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    ffn_type: str = "swiglu"
    freeze_up_proj: bool = False
    bias: bool = False
    dropout: float = 0.0
    residual_gain: float = 1.0
    zero_init_outputs: bool = False
    short_conv: int = 0

    def __post_init__(self) -> None:
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for registry, name in (
            (ATTENTIONS, self.attention_type),
            (FEED_FORWARDS, self.ffn_type),
            (NORM_LAYERS, self.norm),
        ):
            if name not in registry.names():
                registry.get(name)  # raises with the list and the nearest spelling
        if self.d_ff == 0:
            object.__setattr__(self, "d_ff", default_d_ff(self.d_model, self.ffn_type))
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> list[str]:
        found = []
        for name in ("d_model", "n_heads", "n_kv_heads", "d_ff"):
            if getattr(self, name) < 1:
                found.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if found:
            return found
        if self.d_model % self.n_heads:
            found.append(f"n_heads must divide d_model: {self.d_model} is no multiple of {self.n_heads}")
        elif self.rope_theta is not None and self.head_dim % 2:
            found.append(f"rotary positions need an even head width, got {self.head_dim}")
        if self.n_kv_heads > self.n_heads or self.n_heads % self.n_kv_heads:
            found.append(f"n_kv_heads must divide n_heads: {self.n_kv_heads} does not divide {self.n_heads}")
        if self.short_conv < 0 or self.short_conv == 1:
            found.append(f"short_conv must be 0 (off) or at least 2, got {self.short_conv}")
        if self.short_conv and not self.causal and self.short_conv % 2 == 0:
            found.append(f"short_conv {self.short_conv} of a bidirectional block is even: it has no middle")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.residual_gain <= 1:
            found.append(f"residual_gain must be in [0, 1], got {self.residual_gain}")
        if self.norm_placement not in ("pre", "post"):
            found.append(f"norm_placement must be pre or post, got {self.norm_placement!r}")
        if self.freeze_up_proj and not FFN_TYPES.get(self.ffn_type, True):
            found.append(f"freeze_up_proj needs a gated feed-forward (such as swiglu), got {self.ffn_type}")
        return found

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> BlockSpec:
        """From keyword arguments; an unknown one is a TypeError with the nearest spelling."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise TypeError(f"unknown block option {name!r}{hint}")
        return cls(**options)


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
    head is the embedding's matrix. `time`: how it is told the time of the noise; null: it is not.
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
    embedding_norm: bool = False
    time: TimeSpec | None = None

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

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in forward order, the tail last."""
        return tuple(b for stack in self.stacks for b in stack.blocks) + self.tail

    @property
    def is_causal(self) -> bool:
        return all(block.causal for block in self.blocks)

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
