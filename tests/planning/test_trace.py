"""Traces without storage are those of real steps, and racks with few blocks show what racks with many take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stackwise.curriculum.split import apply_training
from stackwise.kernels.device import device_kind
from stackwise.kernels.rotary import rotary_table
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import recompute_block, run_block
from stackwise.objectives.causal import CausalLM
from stackwise.planning.fake import fake_tensors, without_storage
from stackwise.planning.held import held
from stackwise.planning.live import LiveBytes
from stackwise.planning.situation import KEPT, Situation, shortened
from stackwise.planning.trace import LIVE, full_trace, trace

EVERYTHING = frozenset({"embedding", *(f"stack:s{i}" for i in range(3)), "norm", "head"})


def make_rack(**options):
    shape = {"n_kv_heads": 2, "attention_preset": "gpt_style", "max_seq_len": 32, "tie_embeddings": False}
    return create_simple_rack(3, 2, 32, 48, 4, 61, **{**shape, **options})


@pytest.fixture(scope="module")
def spec():
    return make_rack().spec


def situations(spec):
    base = Situation(spec, EVERYTHING, 3, 32)
    newest = frozenset({"stack:s2", "norm", "head"})
    yield "end to end", base
    yield "append", replace(base, units=newest, edges=True)
    yield "a block in the middle", replace(base, units=frozenset({"block:s2.0"}))
    yield (
        "run again, weights cast for the whole step",
        replace(base, kind="cuda", dtype="bfloat16", recompute=True, micro_batches=2),
    )
    yield "streamed", replace(base, units=newest, frozen="streamed", trained="streamed")
    new = frozenset({"stack:s0", "embedding"})
    yield "the new stack held to consistency", replace(base, units=new, held=2)
    yield "a block of it", replace(base, units=frozenset({"block:s0.1"}), held=2, edges=True)
    yield "alone", replace(base, units=frozenset({"stack:s0", "head"}), alone=0)
    yield "updated in the backward pass", replace(base, optimizer='{"memory": "fused"}')


def test_few_blocks_show_what_many_take(spec):
    for name, situation in situations(spec):
        small, counts = shortened(situation)
        assert len(small.spec.blocks) < len(spec.blocks), name
        assert sum(counts) == len(spec.blocks), name
        assert trace(situation) == full_trace(situation), name


def test_stages_that_differ_by_blocks_in_the_middle_are_traced_once(spec):
    longer = spec.with_stacks([*spec.stacks[:2], *(replace(spec.stacks[1], uid=f"x{i}") for i in range(5))])
    units = frozenset({"stack:s0", "norm"})
    one, two = Situation(spec, units, 2, 8), Situation(longer, units, 2, 8)
    assert shortened(one)[0] == shortened(two)[0]
    assert shortened(two)[1][KEPT - 1 :] != shortened(one)[1][KEPT - 1 :]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_trace_is_that_of_a_real_step(spec, dtype, remat):
    units = frozenset({"stack:s1", "stack:s2", "norm", "head"})
    planned = trace(Situation(spec, units, 3, 32, dtype=dtype, recompute=remat))
    rack = make_rack()
    split = apply_training(rack, units)
    rack.runner = recompute_block if remat else run_block
    rotary_table.cache_clear()
    with LiveBytes([*rack.parameters(), *rack.buffers()]) as live:
        ids = torch.randint(0, 61, (3, 32))
        example = CausalLM().corrupt({"input_ids": ids, "next_ids": ids[:, 0].clone()})
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = rack.forward_features(example.input_ids, prefix=split.prefix)
            loss = CausalLM().loss(hidden, rack.head, example)[0]
        del hidden
        loss.backward()
    assert planned.most[LIVE] == pytest.approx(live.peak, rel=0.01)


def test_live_bytes_are_those_of_storages_each_once():
    kept = torch.zeros(10)
    with LiveBytes([kept]) as live:
        kept.add_(1)
        a = torch.zeros(100)
        views = [a[:50], a.view(10, 10), a.detach(), kept.detach()]
        assert live.now == 400
        del a
        assert live.now == 400, "views keep the storage"
        views.clear()
        assert live.now == 0
        assert live.peak == 400
        live.start(7)
        b = torch.zeros(5)
        assert live.peak == 20
        assert live.changes == {7: 20}
        del b
        assert live.changes == {7: 0}


def test_weights_gradients_and_moments_are_counted_without_building_every_block(spec):
    situation = Situation(spec, EVERYTHING, 1, 8)
    rack, own = make_rack(), held(situation)
    numbers = rack.get_parameter_count()
    assert own.both("parameters") == own.both("trainable") == numbers
    assert own.total("weight_bytes") == own.total("gradients") == 4 * numbers
    assert own.total("moments") == 8 * numbers + 4 * len(list(rack.parameters()))
    assert own.device["head"].parameters == 61 * 32
    frozen = held(replace(situation, units=frozenset({"norm"})))
    assert frozen.both("trainable") == 32
    assert frozen.prefix_blocks == len(spec.blocks)
    streamed = held(replace(situation, units=frozenset({"norm"}), frozen="streamed"))
    assert streamed.total("weight_bytes") == 4 * (2 * 61 * 32 + 32)
    assert streamed.total("weight_bytes", host=True) == 4 * numbers - streamed.total("weight_bytes")


def test_tensors_without_storage_leave_nothing_behind(spec):
    with torch.device("meta"):
        rack = make_rack()
    with fake_tensors("cuda"):
        without_storage(rack)
        assert device_kind(rack.embedding.weight) == "cuda"
        rack.forward_features(torch.zeros(1, 4, dtype=torch.int64))
    x = torch.randn(2, 4, 8, 16)
    assert device_kind(x) == "cpu"
    attended = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert torch.isfinite(attended).all()
    real = make_rack()(torch.zeros(1, 4, dtype=torch.int64))
    assert torch.isfinite(real).all(), "no table without numbers was kept"


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "edges", "keeps_scores"),
    [("bfloat16", 2, True, False), ("float32", 4, False, False), ("float32", 2, False, True)],
)
def test_attention_on_an_accelerator_keeps_scores_only_where_no_fused_kernel_takes_it(
    dtype, kv_heads, edges, keeps_scores
):
    """Fused kernels keep what grows with the tokens; scores, and masks, grow with their square."""
    spec = create_simple_rack(1, 1, 32, 48, 4, 61, n_kv_heads=kv_heads, attention_preset="gpt_style").spec
    short, long = (
        trace(Situation(spec, frozenset({"stack:s0"}), rows, tokens, "cuda", dtype, edges=edges)).most[
            "activations"
        ]
        for rows, tokens in ((6, 16), (3, 32))
    )
    squares = 3 * 32 * 32 - 6 * 16 * 16
    if keeps_scores:
        assert long - short == pytest.approx(4 * 4 * squares, abs=0.03 * short)  # fp32, four heads
    else:
        assert long - short == pytest.approx(2 * squares if edges else 0, abs=0.03 * short)
