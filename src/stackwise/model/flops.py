"""FLOPs of a training step from descriptions, without building anything.

Counting follows the matrices: a matrix of P numbers costs 2P FLOP per token forward, 2P for the gradient to its
input and 2P for the gradient to itself. Attention adds 4 T D per token forward over T visible positions (half of
that when causal), and twice as much backward; `attention_flops` says what its other kinds cost. Norms, activations,
rotations and short convolutions are left out (under 1 %), and so is what is paid per row or step and not per token,
such as telling the time of the noise or unpacking a 4-bit matrix.

In cost units, one block's forward pass is 1: a trained block costs 3, a frozen one before the first trained tensor 1,
a frozen one behind it 2, and a block whose forward pass is repeated for the backward pass 1 more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from stackwise.model.attention_flops import (
    INTO_ATTENTION,
    attention_flops,
    attention_matrices,
    feature_flops,
)
from stackwise.model.block_spec import BlockSpec
from stackwise.model.settings import FFN_TYPES
from stackwise.model.spec import AdapterSpec, RackSpec, StackSpec


def block_matrices(spec: BlockSpec) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of the matrices of a block, in the order in which they are used."""
    width, matrices = spec.d_model, attention_matrices(spec)
    moe = spec.experts
    if moe is None:
        return {**matrices, **_feed_forward("ffn", spec, spec.d_ff)}
    wide = moe.width or spec.d_ff
    matrices["ffn.router"] = (moe.n_experts, width)
    for i in range(moe.n_experts):
        matrices |= _feed_forward(f"ffn.experts.{i}", spec, wide)
    return matrices | (_feed_forward("ffn.shared", spec, moe.n_shared * wide) if moe.n_shared else {})


def _feed_forward(prefix: str, spec: BlockSpec, wide: int) -> dict[str, tuple[int, int]]:
    shapes = {"up": (wide, spec.d_model), "down": (spec.d_model, wide)}
    if FFN_TYPES.get(spec.ffn_type, False):
        shapes = {"gate": (wide, spec.d_model), **shapes}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def visited(spec: BlockSpec, name: str) -> float:
    """Share of the tokens that a matrix of a block sees: below 1 for those of experts."""
    return spec.experts.share if spec.experts is not None and name.startswith("ffn.experts.") else 1.0


def block_matrix_parameters(spec: BlockSpec) -> int:
    """Numbers in the matrices of a block, all experts included."""
    return sum(rows * columns for rows, columns in block_matrices(spec).values())


def active_matrix_parameters(spec: BlockSpec) -> float:
    """Numbers in the matrices of a block that a token meets."""
    return sum(visited(spec, name) * rows * columns for name, (rows, columns) in block_matrices(spec).items())


def block_forward_flops(spec: BlockSpec, seq_len: int) -> float:
    """FLOP per token of one block's forward pass over rows of `seq_len` tokens."""
    return 2.0 * active_matrix_parameters(spec) + attention_flops(spec, seq_len) + feature_flops(spec)


def adapter_numbers(adapter: AdapterSpec, rows: int, columns: int) -> int:
    """Numbers in the matrices that a set adds to a [rows, columns] layer."""
    if adapter.method == "mora":
        return math.isqrt((rows + columns) * adapter.rank) ** 2
    return adapter.rank * (rows + columns)


def targets(adapter: AdapterSpec, name: str) -> bool:
    """Whether a set sits on the layer `name` of a block, such as attn.q."""
    leaf = name.rpartition(".")[2]
    if leaf == "router":
        return False
    if "all-linear" in adapter.targets or leaf in adapter.targets or name in adapter.targets:
        return True
    return len(adapter.targets) == 1 and re.fullmatch(adapter.targets[0], name) is not None


@dataclass(frozen=True)
class Work:
    """What a step does with one block. `sets`: adapters in the graph; `learning`: names of those that train."""

    spec: BlockSpec
    trains: bool
    sets: tuple[AdapterSpec, ...]
    learning: frozenset[str]


def rows_of(spec: RackSpec, trained: Collection[str], alone: int | None = None) -> Iterator[Work]:
    """The blocks that a step runs, in forward order; `alone`: only the stack with this build index.

    `trained` holds unit names: "stack:<uid>", "block:<uid>.<i>", "lora.<set>:<uid>", "tail", ...
    """
    for stack in spec.stacks:
        if alone is None or stack.build_index == alone:
            yield from _rows_of_stack(stack, trained)
    for block in spec.tail if alone is None else ():
        yield Work(block, "tail" in trained, (), frozenset())


def _rows_of_stack(stack: StackSpec, trained: Collection[str]) -> Iterator[Work]:
    learning = frozenset(s.name for s in stack.adapters if f"lora.{s.name}:{stack.uid}" in trained)
    for i, block in enumerate(stack.blocks):
        trains = f"stack:{stack.uid}" in trained or f"block:{stack.uid}.{i}" in trained
        yield Work(block, trains, stack.adapters, learning)


def step_flops(
    spec: RackSpec,
    trained: Collection[str],
    seq_len: int,
    *,
    recompute: bool = False,
    recompute_frozen: bool | None = None,
    cached: int = 0,
    alone: int | None = None,
    scored: float = 1.0,
) -> float:
    """FLOP per token of one training step that trains the named units (see `rows_of`; and "embedding", "norm", "head",
    and "io:<uid>" for those of a stack that runs alone).

    `recompute`: blocks that gradients pass run their forward pass twice; `recompute_frozen` (null: alike) says it for
    those of which no more than adapters train. `cached`: leading blocks whose output is
    read from the activation store. `scored`: share of the positions that the head reads. Looking up the embedding is
    free.
    """
    own_io = any(unit.startswith("io:") for unit in trained)
    flows = (own_io or "embedding" in trained) and spec.embedding_trains
    total = _embedding_flops(spec, flows) if not cached else 0.0
    for index, work in enumerate(rows_of(spec, trained, alone)):
        if index < cached:
            continue
        forward, backward, flows = _block_flops(work, seq_len, flows)
        again = recompute if work.trains or recompute_frozen is None else recompute_frozen
        total += forward * (2 if again and flows else 1) + backward
    flows = flows or ("norm" in trained and spec.final_norm)
    learns = {name for name in ("embedding", "head") if own_io or name in trained}
    return total + scored * _head_flops(spec, flows, learns)


def embedding_matrices(spec: RackSpec) -> list[tuple[int, int]]:
    """(outputs, inputs) of what stands between table and model, in order."""
    if spec.adapter_hidden:
        return [(spec.adapter_hidden, spec.table_width), (spec.d_model, spec.adapter_hidden)]
    return [(spec.d_model, spec.table_width)] if spec.embedding_adapter else []


def head_matrices(spec: RackSpec) -> list[tuple[int, int, str]]:
    """(outputs, inputs, whose it is: head, embedding or nobody, where it never trains) of the head's matrices, in order."""
    width, table = spec.d_model, "embedding" if spec.tied else "head"
    if spec.tied and not spec.table_trains:
        table = "nobody"
    transposed = spec.tied and spec.tie_adapter == "transpose"
    return [
        *([(width, width, "head")] if spec.head_transform else []),
        *([(spec.head_width, width, "embedding" if transposed else "head")] if spec.head_adapter else []),
        (spec.vocab_size, spec.head_width, table),
    ]


def _embedding_flops(spec: RackSpec, trains: bool) -> float:
    """FLOP per token between table and model; looking up is free."""
    total, flows = 0.0, trains and spec.table_trains
    for rows, columns in embedding_matrices(spec):
        total += 2.0 * rows * columns * (1 + trains + flows)
        flows = trains
    return total


def _head_flops(spec: RackSpec, flows: bool, learns: Collection[str]) -> float:
    """FLOP per token that the head reads; `flows`: what it reads has a gradient."""
    total = 2.0 * spec.vocab_size * (spec.head_bias and "head" in learns)
    for rows, columns, owner in head_matrices(spec):
        total += 2.0 * rows * columns * (1 + flows + (owner in learns))
        flows = flows or owner in learns or ("head" in learns and spec.head_transform)
    return total


def step_units(
    spec: RackSpec,
    trained: Collection[str],
    *,
    recompute: bool = False,
    cached: int = 0,
    alone: int | None = None,
) -> int:
    """The cost of a step in forward passes of one block; embedding and head are left out."""
    total, flows = 0, "embedding" in trained or any(unit.startswith("io:") for unit in trained)
    for index, work in enumerate(rows_of(spec, trained, alone)):
        if index < cached:
            continue
        learns = work.trains or bool(work.learning)
        flows = flows or learns
        total += 3 if work.trains else 2 if flows else 1
        total += recompute and flows
    return total


def _block_flops(work: Work, seq_len: int, flows: bool) -> tuple[float, float, bool]:
    """(forward, backward, whether the output has a gradient) of a block whose input has one or not (`flows`)."""
    block, trains = work.spec, work.trains
    matrices, attention, features = (
        block_matrices(block),
        attention_flops(block, seq_len),
        feature_flops(block),
    )
    # A norm or a short convolution that trains in front of a layer needs the gradient of the layer's input.
    normed = block.norm_placement != "post" and block.attn_input_norm
    own_front = trains and (normed or bool(block.short_conv))
    into_attention = flows or own_front
    forward, backward = attention + features, 0.0
    inputs = [name for name in attention_matrices(block) if name != "attn.o"]
    reached = {name: into_attention for name in inputs if name not in INTO_ATTENTION}

    def gives(name: str) -> bool:
        return reached[name] or trains or any(s.name in work.learning and targets(s, name) for s in work.sets)

    for name, (rows, columns) in matrices.items():
        if name == "attn.o":
            reached[name] = any(gives(n) for n in inputs)
            backward += (2 * attention + features) * reached[name]
        elif name in INTO_ATTENTION:
            reached[name] = gives(INTO_ATTENTION[name])
        elif name.endswith(".down"):
            before = name.removesuffix("down")
            reached[name] = any(gives(before + n) for n in ("gate", "up") if before + n in matrices)
        elif name not in reached:
            reached[name] = into_attention if block.parallel else flows or gives("attn.o") or trains
        seen = visited(block, name)
        product = 2.0 * rows * columns * seen
        weight_trains = trains and not (block.freeze_up_proj and name.endswith(".up"))
        forward += product
        backward += product * (reached[name] + weight_trains)
        for adapter in work.sets:
            if targets(adapter, name):
                added = _adapter_flops(adapter, rows, columns, adapter.name in work.learning, reached[name])
                forward, backward = forward + seen * added[0], backward + seen * added[1]
    last = any(gives(name) for name in matrices if name.endswith((".down", "attn.o")))
    return forward, backward, flows or last


def _adapter_flops(
    adapter: AdapterSpec, rows: int, columns: int, learns: bool, reached: bool
) -> tuple[float, float]:
    """(forward, backward) of a set on one layer; `reached`: the layer's input has a gradient."""
    forward = 2.0 * adapter_numbers(adapter, rows, columns)
    if not learns:
        return forward, forward * reached
    second = forward * rows / (rows + columns) if adapter.method != "mora" else 0.0
    return forward, forward + (forward if reached else second)
