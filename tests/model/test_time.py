"""Racks that are told the time of the noise: features, both ways in, and whose parameters they are."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from stackwise.curriculum.growth import grow
from stackwise.curriculum.split import apply_training
from stackwise.curriculum.stage import Growth
from stackwise.model.block_spec import BlockSpec
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec, StackSpec, TimeSpec
from stackwise.model.time import step_of
from stackwise.trunk.keys import prefix_hash
from stackwise.trunk.residency import reside

WAYS = [(e, c) for e in ("sinusoidal", "learned") for c in ("add", "adaln")]
KINDS = pytest.mark.parametrize(("encoding", "conditioning"), WAYS)


def spec_of(encoding="sinusoidal", conditioning="add", width=24, *, d_model=32, stacks=2, **block):
    one = BlockSpec(d_model, 4, **block)
    time = TimeSpec(width, 40, encoding, conditioning)
    listed = tuple(StackSpec(f"s{i}", (one, one), i) for i in range(stacks))
    return RackSpec(50, d_model, listed, max_seq_len=16, time=time)


def awake(rack):
    """Every number of the time input at random, those that start at zero included."""
    for parameter in rack.time.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return rack


def batch(rows=3, tokens=7):
    return torch.randint(0, 50, (rows, tokens)), torch.rand(rows, dtype=torch.float64) * 0.98 + 0.01


def described(rack, time):
    """The vector of each row [B, D], written down plainly; of adaln the one before the last Linear."""
    t = rack.time
    if t.spec.encoding == "learned":
        inner = torch.stack([t.table[min(int(float(x) * 40), 39)] for x in time])
    else:
        rows = [
            [
                (math.sin, math.cos)[i % 2](1000 * float(x) / 10000 ** (2 * (i // 2) / t.spec.width))
                for x in time
            ]
            for i in range(t.spec.width)
        ]
        inner = F.silu(F.linear(torch.tensor(rows, dtype=torch.float64).T, t.hidden.weight, t.hidden.bias))
    last = t.added if t.added is not None else t.out
    return F.linear(inner, last.weight, last.bias)


@KINDS
@pytest.mark.parametrize("width", [24, 7])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_rack_equals_its_formula(encoding, conditioning, width, placement):
    rack = awake(Rack(spec_of(encoding, conditioning, width, norm_placement=placement)).double())
    ids, time = batch()
    x = rack.embedding.weight[ids]
    vector, told = described(rack, time), torch.zeros(4, 3, 32, dtype=torch.float64)
    if conditioning == "add":
        x = x + vector[:, None]
    else:
        modulation = rack.time.modulation
        told = F.linear(F.silu(vector), modulation.weight, modulation.bias).view(3, 4, 32).transpose(0, 1)

    def norm(module, y, i):
        normed = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight
        return normed * (1 + told[i][:, None]) + told[i + 1][:, None]

    context = rack.make_context(ids, time_step=time)
    for block in rack.blocks():
        if placement == "pre":
            x = x + block.attn(norm(block.attn_norm, x, 0), context)
            x = x + block.ffn(norm(block.ffn_norm, x, 2))
        else:
            x = norm(block.attn_norm, x + block.attn(x, context), 0)
            x = norm(block.ffn_norm, x + block.ffn(x), 2)
    expected = F.linear(rack.norm(x), rack.head.matrix)
    torch.testing.assert_close(rack(ids, time_step=time), expected, atol=1e-9, rtol=1e-9)


def test_steps_of_evenly_drawn_times_are_flat_and_the_end_is_in_the_last():
    time = (torch.arange(1, 10_001) * (math.sqrt(5) - 1) / 2).frac()
    counts = torch.bincount(step_of(torch.cat((time, torch.ones(1))), 20), minlength=20)
    assert len(counts) == 20
    assert (counts - 500).abs().max() <= 25
    assert step_of(torch.tensor([1.0, 1e-9, 0.05, 0.0499]), 20).tolist() == [19, 0, 1, 0]


@KINDS
def test_time_changes_logits_and_all_its_parameters_get_gradients(encoding, conditioning):
    rack = awake(Rack(spec_of(encoding, conditioning, width=512)))
    ids, _ = batch()
    out = rack(ids, time_step=torch.tensor([0.1, 0.6, 1.0]))
    other = rack(ids, time_step=torch.tensor([0.1, 0.6, 0.3]))
    changed = (out - other).abs().amax((1, 2))
    assert changed[:2].max() == 0 < changed[2]
    out.square().sum().backward()
    for name, parameter in rack.time.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    if encoding == "learned":
        assert rack.time.table.grad.abs().amax(1).nonzero().flatten().tolist() == [4, 24, 39]


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
def test_adaln_starts_as_the_model_without_time_and_learns_to_use_it(encoding):
    spec = spec_of(encoding, "adaln")
    rack, plain = Rack(spec, seed=3), Rack(replace(spec, time=None), seed=3)
    ids, time = batch()
    assert torch.equal(rack(ids, time_step=time), plain(ids))
    rack(ids, time_step=time).square().sum().backward()
    assert rack.time.modulation.weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
def test_what_is_added_starts_no_larger_than_the_embeddings(encoding, norm):
    rack = Rack(replace(spec_of(encoding), embedding_norm=norm))
    ids, time = torch.randint(0, 50, (40, 7)), torch.linspace(0.02, 1, 40)
    added = rack.make_context(ids, time_step=time).time.added
    ratio = added.std() / rack.look_up(ids).std()
    assert 0.2 < ratio < 1.5


def test_a_missing_an_unwanted_and_a_misshapen_time_are_told():
    ids, time = batch()
    told, plain = Rack(spec_of()), Rack(replace(spec_of(), time=None))
    for call in (
        told,
        told.forward_features,
        told.make_context,
        lambda i: told.forward_from_stack(told.look_up(i), 0),
    ):
        with pytest.raises(ValueError, match=r"needs time_step, a float tensor \[3\]"):
            call(ids)
    for call in (plain, plain.forward_features, plain.make_context):
        with pytest.raises(ValueError, match="time_interpretation=input"):
            call(ids, time_step=time)
    for wrong in (time[:2], time[:, None], torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"must be a float tensor \[3\], got"):
            told(ids, time_step=wrong)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            told(ids, time_step=torch.tensor([0.5, wrong, 1.0]))
    for values, message in (
        ({"width": 0}, "width of the time input must be at least 1"),
        ({"steps": 0}, "steps of the time input"),
        ({"encoding": "lerned"}, "did you mean 'learned'"),
        ({"conditioning": "adaLN"}, "add or adaln"),
    ):
        with pytest.raises(ValueError, match=message):
            TimeSpec(**{"width": 8, "steps": 10, **values})


def test_specs_survive_json_and_old_records_have_no_time():
    spec = spec_of("learned", "adaln")
    assert RackSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    old = spec.to_dict()
    del old["time"]
    assert RackSpec.from_dict(old) == replace(spec, time=None)


@KINDS
def test_the_time_input_belongs_to_the_embedding(encoding, conditioning):
    rack = Rack(spec_of(encoding, conditioning))
    named = {f"time.{name}" for name, _ in rack.time.named_parameters()}
    assert named <= rack.parts()["embedding"].keys()
    assert rack.time in rack.units()[0][1]
    apply_training(rack, {"stack:s0"})
    assert not any(p.requires_grad for p in rack.time.parameters())
    split = apply_training(rack, {"embedding"})
    assert split.prefix == 0
    assert {n for n, p in rack.named_parameters() if p.requires_grad} == {*named, "embedding.weight"}
    before = {name: tensor.clone() for name, tensor in rack.time.state_dict().items()}
    grown, _ = grow(rack, Growth("prepend", 1), seed=1)
    assert all(torch.equal(t, before[n]) for n, t in grown.time.state_dict().items())
    ids, time = batch()
    assert grown(ids, time_step=time).shape == (3, 7, 50)


@pytest.mark.parametrize("conditioning", ["add", "adaln"])
def test_stored_outputs_of_a_prefix_are_those_of_one_time_input(conditioning):
    rack = awake(Rack(spec_of("learned", conditioning)))
    first = prefix_hash(rack, 2)
    assert prefix_hash(rack, 2) == first
    with torch.no_grad():
        rack.time.table[3, 3] += 1
    assert prefix_hash(rack, 2) != first


@pytest.mark.parametrize("conditioning", ["add", "adaln"])
@pytest.mark.parametrize("units", [{"embedding", "stack:s1"}, {"embedding"}, {"stack:s0", "head"}])
@pytest.mark.parametrize("where", ["streamed", "recomputed"])
def test_gradients_are_those_of_a_resident_run(conditioning, units, where):
    ids, time = batch()
    found = []
    for streams in (False, True):
        torch.manual_seed(5)
        rack = awake(Rack(spec_of("sinusoidal", conditioning)))
        apply_training(rack, units)
        if streams:
            place = "streamed" if where == "streamed" else "resident"
            recompute = where == "recomputed"
            reside(rack, torch.device("cpu"), frozen=place, trained=place, recompute=recompute)
        rack(ids, time_step=time).square().sum().backward()
        found.append({n: p.grad for n, p in rack.named_parameters() if p.grad is not None})
    resident, other = found
    assert resident.keys() == other.keys()
    assert any(name.startswith("time.") for name in resident) == ("embedding" in units)
    for name, gradient in resident.items():
        torch.testing.assert_close(other[name], gradient, msg=name)
