"""Rules of thumb for large models: bytes and FLOPs from a handful of numbers, before there is a config.

They hold for blocks of the Llama kind in bf16 with flash attention, D wide, keys and values K wide together per kind,
feed-forward F wide, on n tokens at a time:

    frozen weights     bits / 8 per parameter
    trained            16 bytes per parameter (bf16 weight and gradient, fp32 master, two fp32 moments), 10 with 8-bit
                       moments, 6 without master, 4 with the update fused into the backward pass; adapters 16
    boundary           2 D n between two blocks
    inside of a block  (14 D + 4 K + 6 F) n, alive for one block at a time: the others keep their boundary alone
    cache              2 D per token (fp8: D)

A plan of a config (`planning.plan`) counts on the real modules instead.
"""

from __future__ import annotations

from collections.abc import Collection

from stackwise.model.block_spec import BlockSpec
from stackwise.model.flops import step_units
from stackwise.model.spec import AdapterSpec, RackSpec, StackSpec

TRAINED_BYTES = {"16": 16.0, "int8": 10.0, "int8_nomaster": 6.0, "fused": 4.0}
"""Bytes per trained parameter by optimizer memory; 16 is the plain one."""
ADAPTER_BYTES = 16.0
DAY = 86_400.0


def frozen_bytes(parameters: float, weight_format: str) -> float:
    """Weights that only run forward."""
    from stackwise.precision.formats import format_of

    return parameters * format_of(weight_format).bits / 8


def boundary_bytes(block: BlockSpec, tokens: int) -> float:
    """The stream between two blocks, in bf16."""
    return 2.0 * block.d_model * tokens


def inside_bytes(block: BlockSpec, tokens: int) -> float:
    """What the backward pass of one block needs, in bf16."""
    kv_width = block.n_kv_heads * block.head_dim
    return (14.0 * block.d_model + 4.0 * kv_width + 6.0 * block.d_ff) * tokens


def activation_bytes(block: BlockSpec, tokens: int, layers_with_gradient: int) -> float:
    """The inside of one block, and a boundary before, between and after all that gradients pass."""
    return inside_bytes(block, tokens) + (layers_with_gradient + 1) * boundary_bytes(block, tokens)


def cache_bytes(block: BlockSpec, tokens: float, bytes_each: int = 2) -> float:
    """Stored activations of one boundary: bf16 2 bytes a number, fp8 1."""
    return float(bytes_each * block.d_model * tokens)


SCHEMES = ("end_to_end", "append", "append_cached", "prepend", "adapters", "independent")


def scheme_units(scheme: str, n_stacks: int, recompute: bool = False) -> float:
    """Forward passes of the whole trunk per token, when each of `n_stacks` stages sees every token.

    Summed over the stages of a rack of `n_stacks` equal stacks; embedding and head are left out. `recompute`: blocks
    that gradients pass run forward twice; under prepend and adapters only those that do not train.
    """
    per_stage = [_stage_units(scheme, n_stacks, stage, recompute) for stage in range(n_stacks)]
    return sum(per_stage) / n_stacks if scheme != "end_to_end" else per_stage[0] / n_stacks


def _stage_units(scheme: str, n_stacks: int, stage: int, recompute: bool) -> float:
    """Stack-sized forward passes of one stage; stages count from 0."""
    newest = f"stack:s{stage}"
    if scheme == "end_to_end":
        everything = {f"stack:s{i}" for i in range(n_stacks)} | {"embedding"}
        return step_units(_skeleton(n_stacks), everything, recompute=recompute)
    if scheme == "independent":
        return step_units(_skeleton(n_stacks), {newest, "embedding"}, recompute=recompute, alone=stage)
    if scheme == "append":
        return step_units(_skeleton(stage + 1), {newest})
    if scheme == "append_cached":  # one more forward pass writes what the next stage reads
        return step_units(_skeleton(stage + 1), {newest}, cached=stage) + 1
    if scheme == "prepend":  # the new stack comes first
        return step_units(_skeleton(stage + 1), {"stack:s0"}) + (stage if recompute else 0)
    if scheme == "adapters":
        units = {newest, "embedding", *(f"lora.trunk:s{i}" for i in range(stage))}
        return step_units(_skeleton(stage + 1, adapters=True), units) + (stage if recompute else 0)
    raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")


def _skeleton(n_stacks: int, adapters: bool = False) -> RackSpec:
    """Equal stacks of one block: enough to count units on."""
    block = BlockSpec(d_model=2, n_heads=1)
    sets = (AdapterSpec("trunk"),) if adapters else ()
    stacks = tuple(StackSpec(f"s{i}", (block,), i, adapters=sets) for i in range(n_stacks))
    return RackSpec(vocab_size=2, d_model=2, stacks=stacks)


def scheme_flops(scheme: str, parameters: float, n_stacks: int, recompute: bool = False) -> float:
    """FLOP per token that every layer sees; `parameters` of the trunk. 2 FLOP per parameter and forward pass."""
    return 2.0 * parameters * scheme_units(scheme, n_stacks, recompute)


def days(flops_per_token: float, tokens: float, rate: float) -> float:
    """Days at `rate` FLOP per second."""
    return flops_per_token * tokens / rate / DAY


def adapter_parameters(block: BlockSpec, rank: int, names: Collection[str] = ()) -> int:
    """Numbers in LoRA matrices on the layers `names` of a block (empty: all)."""
    from stackwise.model.flops import block_matrices

    shapes = block_matrices(block)
    return sum(
        rank * (rows + columns) for name, (rows, columns) in shapes.items() if not names or name in names
    )
