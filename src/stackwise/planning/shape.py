"""A model shape on a device, by the rules of `planning.rules`: what fits, and how long a billion tokens take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from stackwise.config.errors import ConfigError, Problem, did_you_mean
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec, StackSpec
from stackwise.planning import rules
from stackwise.planning.devices import GB, Device

MICRO_BATCH = 16_384
"""Tokens at a time."""
BUFFERS = 0.5 * GB
"""Chunks of logits, and matrices unpacked for one product."""
BILLION = 10**9


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of equal blocks (SwiGLU, RMSNorm, grouped key-value heads, a head of its own)."""

    layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int

    @property
    def block(self) -> BlockSpec:
        return BlockSpec(self.d_model, self.n_heads, self.n_kv_heads, self.d_ff, causal=True)

    def rack_spec(self) -> RackSpec:
        """The whole model as one stack."""
        stack = StackSpec("s0", (self.block,) * self.layers)
        return RackSpec(self.vocab_size, self.d_model, (stack,))


SHAPES = {
    "8b": Shape(32, 4096, 14_336, 32, 8, 128_256),
    "70b": Shape(80, 8192, 28_672, 64, 8, 32_000),
}


def shape_named(name: str) -> Shape:
    """A known shape; another name is a ConfigError with the nearest."""
    if name.lower() not in SHAPES:
        hint = did_you_mean(name.lower(), SHAPES)
        raise ConfigError(Problem("--shape", "is unknown", name, ", ".join(SHAPES), hint))
    return SHAPES[name.lower()]


@dataclass(frozen=True)
class Layout:
    """One way to train the shape. `bytes_each` per trained parameter; `passed`: layers that gradients pass.

    `head_trains`, `embedding_trains`: at that rate; otherwise they are held in bf16. `rank`: of adapters on every
    frozen layer, 0 for none.
    """

    name: str
    frozen_layers: int
    weight_format: str
    trained_layers: int
    bytes_each: float
    passed: int
    head_trains: bool = True
    embedding_trains: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Row:
    """A layout in bytes."""

    layout: Layout
    frozen: float
    trained: float
    embedding_head: float
    activations: float
    adapters: float
    buffers: float
    reserved: float
    fits: str

    @property
    def total(self) -> float:
        """Everything, with buffers and what is reserved."""
        held = self.frozen + self.trained + self.embedding_head + self.activations + self.adapters
        return held + self.buffers + self.reserved


@dataclass(frozen=True)
class Days:
    """A scheme and the days that 10^9 tokens take when every layer sees each of them."""

    name: str
    units: float
    days: float
    cache_bytes: float = 0.0


@dataclass(frozen=True)
class ShapePlan:
    """Counted parameters, layouts and days of a shape on a device."""

    name: str
    device: str
    rate: float
    block_parameters: int
    trunk_parameters: int
    rows: list[Row]
    days: list[Days]
    tokens_per_day: float

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "total": row.total} for row in self.rows]
        return {**asdict(self), "rows": rows}


def plan_shape(name: str, device: Device, rate: float | None = None) -> ShapePlan:
    """All layouts and schemes of a shape. `rate` in FLOP/s; null: what the device is taken to sustain in bf16."""
    shape = shape_named(name)
    block, trunk, table = _count(shape)
    speed = rate or device.rate("bfloat16")
    rows = [_row(shape, layout, block, table, device) for layout in layouts(shape.layers)]
    listed = [
        Days(title, units, rules.days(2.0 * trunk * units, BILLION, speed), cache)
        for title, units, cache in _schemes(shape)
    ]
    per_day = speed * rules.DAY / rules.scheme_flops("end_to_end", trunk, 1)
    return ShapePlan(name, device.name, speed, block, trunk, rows, listed, per_day)


def layouts(layers: int) -> list[Layout]:
    """The layouts compared: stacks of a twentieth, a tenth, an eighth and a quarter of the layers."""
    small, tenth, eighth, quarter = layers // 20, layers // 10, layers // 8, layers // 4
    rest = layers - small
    plain, int8, no_master = (rules.TRAINED_BYTES[key] for key in ("16", "int8", "int8_nomaster"))
    both = {"head_trains": True, "embedding_trains": True}
    return [
        Layout(f"append, nf4 trunk {rest}, {small} layers", rest, "nf4", small, plain, small),
        Layout(
            f"append, nf4 trunk {layers - tenth}, {tenth} layers", layers - tenth, "nf4", tenth, int8, tenth
        ),
        Layout(f"append, bf16 trunk {rest}, {small} layers", rest, "bf16", small, plain, small),
        Layout(f"prepend, nf4 suffix {rest}, {small} layers", rest, "nf4", small, plain, layers),
        Layout(f"adapters r 8 on the trunk, {small} layers", rest, "nf4", small, plain, layers, rank=8),
        Layout(f"independent, {layers // small} stacks of {small}", 0, "bf16", small, plain, small, **both),
        Layout(f"independent, 8 stacks of {eighth}", 0, "bf16", eighth, int8, eighth, **both),
        Layout(f"independent, 4 stacks of {quarter}", 0, "bf16", quarter, no_master, quarter, **both),
        Layout("end to end", 0, "bf16", layers, no_master, layers, **both),
    ]


def _row(shape: Shape, layout: Layout, block: int, table: int, device: Device) -> Row:
    """`block`: parameters of a block; `table`: of the embedding, or of the head."""
    frozen = rules.frozen_bytes(layout.frozen_layers * block, layout.weight_format)
    trained = layout.trained_layers * block * layout.bytes_each
    ends = sum(
        table * (layout.bytes_each if trains else 2.0)
        for trains in (layout.head_trains, layout.embedding_trains)
    )
    activations = rules.activation_bytes(shape.block, MICRO_BATCH, layout.passed)
    numbers = rules.adapter_parameters(shape.block, layout.rank) * layout.frozen_layers if layout.rank else 0
    adapters = numbers * rules.ADAPTER_BYTES
    fits = device.verdict(round(frozen + trained + ends + activations + adapters + BUFFERS))
    return Row(layout, frozen, trained, ends, activations, adapters, BUFFERS, device.reserved, fits)


def _schemes(shape: Shape) -> list[tuple[str, float, float]]:
    """(name, forward passes of the trunk per token, bytes of cache for 10^9 tokens)."""
    many, some = 20, 10
    narrow = rules.cache_bytes(shape.block, BILLION, 1)
    return [
        ("end to end", rules.scheme_units("end_to_end", 1), 0.0),
        ("end to end, recomputed", rules.scheme_units("end_to_end", 1, recompute=True), 0.0),
        (f"append, {some} stacks", rules.scheme_units("append", some), 0.0),
        (f"append, {many} stacks", rules.scheme_units("append", many), 0.0),
        ("append, bf16 cache", rules.scheme_units("append_cached", many), 2 * narrow),
        ("append, fp8 cache", rules.scheme_units("append_cached", many), narrow),
        (f"prepend, {many} stacks", rules.scheme_units("prepend", many), 0.0),
        (f"adapters on the trunk, {many} stacks", rules.scheme_units("adapters", many), 0.0),
        (f"independent, {many} stacks", rules.scheme_units("independent", many), 0.0),
        (f"independent, one of {many} stacks", rules.scheme_units("independent", many) / many, 0.0),
    ]


@lru_cache(maxsize=8)
def _count(shape: Shape) -> tuple[int, int, int]:
    """Parameters of a block, of the trunk and of one table [V, D], counted on modules without storage."""
    import torch

    from stackwise.model.rack import Rack

    with torch.device("meta"):
        rack = Rack(shape.rack_spec())
    blocks: Sequence[Any] = rack.blocks()
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return counts[0], sum(counts), rack.head.matrix.numel()
