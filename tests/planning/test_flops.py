"""FLOPs from descriptions are those of the products that real modules run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stackwise.curriculum.split import apply_training
from stackwise.kernels.attention import attention_reference
from stackwise.kernels.product import pytorch_products
from stackwise.model.block_spec import BlockSpec
from stackwise.model.factory import create_simple_rack
from stackwise.model.flops import attention_flops, block_forward_flops, step_flops, step_units
from stackwise.model.own_io import InOut
from stackwise.model.parts import KernelSpec, LatentSpec
from stackwise.model.rack import Rack, recompute_block, run_block
from stackwise.model.spec import AdapterSpec
from stackwise.objectives.causal import CausalLM

BATCH, TOKENS = 2, 12
STACKS = {f"stack:s{i}" for i in range(4)}
EVERYTHING = {"embedding", *STACKS, "norm", "head"}


def make_rack(tied=False, **block):
    """Four stacks of two blocks that see all tokens, so that attention's products are whole ones."""
    options = {"attention_preset": "bert_style", "n_kv_heads": 2, "seed": 0, **block}
    return create_simple_rack(4, 2, 16, 24, 4, 29, tie_embeddings=tied, **options)


def counted(rack, units, monkeypatch, remat=False):
    """FLOP of the products of one training step, per token."""
    monkeypatch.setattr(
        "stackwise.model.attention.core.attention",
        lambda q, k, v, visible, causal, **rest: attention_reference(q, k, v, visible, causal),
    )
    split = apply_training(rack, units)
    rack.runner = recompute_block if remat else run_block
    example = CausalLM().corrupt({"input_ids": torch.randint(0, 29, (BATCH, TOKENS))})
    with FlopCounterMode(display=False) as counter, pytorch_products():
        hidden = rack.forward_features(example.input_ids, prefix=split.prefix)
        CausalLM().loss(hidden, rack.head, example)[0].backward()
    return counter.get_total_flops() / (BATCH * TOKENS)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    "units",
    [
        EVERYTHING,
        {"stack:s3", "norm", "head"},  # append
        {"stack:s0"},  # prepend
        {"stack:s2"},  # cyclic
        {"embedding", "norm", "head"},  # cyclic's other unit
        {"embedding", "stack:s0", "norm", "head"},
        {"stack:s1", "stack:s2", "norm", "head"},  # gradual unfreezing
        {"norm", "head"},
        {"head"},
    ],
    ids=lambda units: "+".join(sorted(units)),
)
def test_flops_of_a_step_are_those_of_its_products(units, remat, monkeypatch):
    rack = make_rack()
    expected = step_flops(rack.spec, units, TOKENS, recompute=remat)
    if remat:
        # PyTorch stops repeating a block once it has what the backward pass needs: before its last product.
        repeated = step_units(rack.spec, units, recompute=True) - step_units(rack.spec, units)
        expected -= repeated * 2 * 16 * 24
    assert counted(rack, units, monkeypatch, remat) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "block",
    [
        {"ffn_type": "gelu"},
        {"norm_placement": "post"},
        {"norm_placement": "both", "attention_bias": "qkv"},
        {"head_width": 6},
        {"parallel": True},
        {"attn_input_norm": False},
        {"freeze_up_proj": True},
        {"n_kv_heads": 1, "qk_norm": True, "bias": True},
        {"attention_preset": "mla_attention", "latent": LatentSpec(12, 6, 4, 6, 10)},
        {"attention_preset": "mla_attention", "latent": LatentSpec(0, 6, 4)},
        {"attention_preset": "kernel_attention"},
        {"attention_preset": "kernel_attention", "kernel": KernelSpec("gaussian", "linear", 8)},
        {"attention_preset": "mlgka", "kernel": KernelSpec("uniform", features=3)},
        {"experts": {"n_experts": 4, "top_k": 3, "n_shared": 2, "width": 7}},
    ],
    ids=lambda block: "-".join(map(str, block.values())),
)
@pytest.mark.parametrize("units", [EVERYTHING, {"stack:s2", "norm", "head"}], ids=["all", "third"])
def test_every_kind_of_block_is_counted(block, units, monkeypatch):
    rack = make_rack(**block)
    assert counted(rack, units, monkeypatch) == pytest.approx(step_flops(rack.spec, units, TOKENS), rel=1e-9)


def test_a_tied_head_trains_with_the_embedding(monkeypatch):
    rack = make_rack(tied=True)
    expected = step_flops(rack.spec, EVERYTHING, TOKENS)
    assert counted(rack, EVERYTHING, monkeypatch) == pytest.approx(expected, rel=1e-9)
    assert step_flops(rack.spec, EVERYTHING - {"embedding"}, TOKENS) < expected


@pytest.mark.parametrize(
    "ends",
    [
        {"tied": True, "embedding_width": 6, "head_transform": True, "head_bias": True},
        {"tied": True, "embedding_width": 24, "tie_adapter": "transpose"},
        {"embedding_width": 6, "adapter_hidden": 10, "head_rank": 5},
        {"head_transform": True, "token_types": 2, "embedding_norm": "learned", "logit_softcap": 5.0},
        {"tied": True, "embedding_width": 6, "frozen_rows": 29},
        {"tied": True, "embedding_width": 6, "frozen_rows": 28, "adapter_hidden": 8},
    ],
    ids=["bert", "transposed", "low rank", "transform", "frozen", "one new row"],
)
@pytest.mark.parametrize(
    "units",
    [EVERYTHING, {"stack:s3", "norm", "head"}, {"stack:s0"}, {"norm", "head"}, {"embedding"}],
    ids=lambda units: "+".join(sorted(units)),
)
def test_what_stands_around_the_blocks_is_counted(ends, units, monkeypatch):
    rack = Rack(replace(make_rack().spec, **ends))
    assert counted(rack, units, monkeypatch) == pytest.approx(step_flops(rack.spec, units, TOKENS), rel=1e-9)


def test_nothing_flows_in_front_of_a_frozen_table(monkeypatch):
    rack = Rack(replace(make_rack().spec, frozen_rows=29))
    expected = step_flops(rack.spec, {"embedding", "stack:s3"}, TOKENS)
    assert expected == step_flops(rack.spec, {"stack:s3"}, TOKENS)
    assert counted(rack, {"embedding", "stack:s3"}, monkeypatch) == pytest.approx(expected, rel=1e-9)


def test_causal_attention_costs_what_is_seen():
    block = BlockSpec(d_model=16, n_heads=2, causal=True)
    assert attention_flops(block, 7) == sum(4 * 16 * seen for seen in range(1, 8)) / 7
    both_ways = block_forward_flops(replace(block, causal=False), 7)
    assert both_ways - block_forward_flops(block, 7) == 4 * 16 * 3


def test_cost_units_are_those_of_the_cost_model():
    spec = make_rack().spec
    assert step_units(spec, EVERYTHING) == 24
    assert step_units(spec, EVERYTHING, recompute=True) == 32
    assert step_units(spec, {"stack:s3", "norm", "head"}) == 6 + 6
    assert step_units(spec, {"stack:s3", "norm", "head"}, cached=6) == 6
    assert step_units(spec, {"stack:s0"}) == 6 + 12
    assert step_units(spec, {"stack:s0"}, recompute=True) == 6 + 12 + 8
    assert step_units(spec, {"stack:s1"}, alone=1) == 6
    trunk = tuple(replace(s, adapters=(AdapterSpec("trunk", rank=2),)) for s in spec.stacks[:3])
    with_sets = spec.with_stacks([*trunk, spec.stacks[3]])
    units = {"stack:s3", "norm", "head", *(f"lora.trunk:s{i}" for i in range(3))}
    assert step_units(with_sets, units) == 2 * 6 + 6
    assert step_units(with_sets, units - {"lora.trunk:s0"}) == 2 + 2 * 4 + 6


def test_cached_blocks_and_blocks_left_out_cost_nothing():
    spec = make_rack().spec
    units = {"stack:s3", "norm", "head"}
    prefix = 6 * block_forward_flops(spec.blocks[0], TOKENS)
    assert step_flops(spec, units, TOKENS) - step_flops(spec, units, TOKENS, cached=6) == prefix
    one = spec.with_stacks([spec.stacks[2]])
    assert step_flops(spec, EVERYTHING, TOKENS, alone=2) == step_flops(one, EVERYTHING, TOKENS)


def by_hand(x, layers, scale):
    """The products of a linear layer with an adapter, for counting: x W^T + scale x A^T B^T."""
    weight, a, b = layers
    return x @ weight.t() + scale * (x @ a.t()) @ b.t()


@pytest.mark.parametrize("flows", [False, True])
def test_an_adapter_costs_its_own_products(flows):
    from stackwise.model.flops import _adapter_flops

    rows, columns, rank, n = 10, 6, 3, 8
    x = torch.randn(n, columns, requires_grad=flows)
    layers = (
        torch.randn(rows, columns),
        torch.randn(rank, columns).requires_grad_(),
        torch.randn(rows, rank).requires_grad_(),
    )
    with FlopCounterMode(display=False) as counter:
        by_hand(x, layers, 2.0).sum().backward()
    forward, backward = _adapter_flops(AdapterSpec("a", rank=rank), rows, columns, True, flows)
    base = 2 * rows * columns * (2 if flows else 1)
    assert counter.get_total_flops() / n == forward + backward + base


@pytest.mark.parametrize("tied", [False, True])
def test_a_stack_with_embedding_and_head_of_its_own_costs_what_its_products_are(monkeypatch, tied):
    rack = make_rack(tied=tied)
    rack.stacks[1].io = InOut(rack.spec).copy_from(rack)
    units = {"stack:s1", "io:s1"}
    split = apply_training(rack, units, alone=1)
    assert split.prefix == 0
    monkeypatch.setattr(
        "stackwise.model.attention.core.attention",
        lambda q, k, v, visible, causal, **rest: attention_reference(q, k, v, visible, causal),
    )
    example = CausalLM().corrupt({"input_ids": torch.randint(0, 29, (BATCH, TOKENS))})
    with FlopCounterMode(display=False) as counter, pytorch_products():
        CausalLM().loss(rack.forward_features(example.input_ids), rack.io.head, example)[0].backward()
    assert step_flops(rack.spec, units, TOKENS, alone=1) == counter.get_total_flops() / (BATCH * TOKENS)
    assert all(p.grad is not None for p in rack.stacks[1].io.parameters())
    assert all(p.grad is None for p in (rack.embedding.weight, rack.head.matrix))
