"""Sets folded into the weights, over fp32 and over 4-bit bases."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stackwise.adapters.attach import adapter_parameters, attach, sets
from stackwise.adapters.merge import fold, folded_weights, merge, merge_and_requantise, unmerge
from stackwise.model.linear import Linear
from stackwise.model.names import adapter_set_of
from stackwise.model.spec import AdapterSpec
from stackwise.precision.convert import freeze_stack
from stackwise.precision.frozen_linear import FrozenLinear

from .conftest import teach

METHODS = ["lora", "dora", "mora"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=["fp32", "nf4"])
def format(request):
    return request.param


def adapted(rack, format, *methods, **options):
    """The first stack of a rack in a format, with one taught set per method, named after it."""
    stack = rack.stacks[0]
    if format != "fp32":
        freeze_stack(stack, format)
    for method in methods:
        attach(stack, AdapterSpec(method, method, rank=4, alpha=8.0, **options))
        teach(stack, method, 0.1)
    return stack.eval()


@pytest.mark.parametrize("names", [None, "lora", "dora", "mora"])
def test_merging_keeps_the_output_and_the_saved_tensors_and_unmerging_restores_every_bit(
    rack, ids, format, names
):
    stack = adapted(rack, format, *METHODS)
    with torch.no_grad():
        before, saved = rack(ids), {n: t.clone() for n, t in rack.state_dict().items()}
        merge(stack, names)
        torch.testing.assert_close(rack(ids), before, **CLOSE)
        layer = stack.blocks[0].attn.v
        assert layer.merged_adapters == (METHODS if names is None else [names])
        x = torch.randn(2, 24)
        assert (layer.merged_weight @ x.T - layer.base_layer(x).T).abs().max() > 1e-3
        assert rack.state_dict().keys() == saved.keys()
        assert all(torch.equal(t, saved[n]) for n, t in rack.state_dict().items())
        unmerge(stack, names)
        assert torch.equal(rack(ids), before)
        assert layer.merged_weight is None


def test_sets_are_merged_and_unmerged_one_by_one(rack, ids):
    stack = adapted(rack, "fp32", *METHODS)
    with torch.no_grad():
        before = rack(ids)
        for name in ("mora", "dora"):
            merge(stack, name)
            torch.testing.assert_close(rack(ids), before, **CLOSE)
        unmerge(stack, "mora")
        torch.testing.assert_close(rack(ids), before, **CLOSE)
        assert stack.blocks[0].attn.q.merged_adapters == ["dora"]
        unmerge(stack)
        assert torch.equal(rack(ids), before)


def test_a_base_under_merged_sets_cannot_train(rack, ids):
    stack = adapted(rack, "fp32", "lora")
    merge(stack)
    with pytest.raises(RuntimeError, match="unmerge first"):
        rack(ids)
    stack.requires_grad_(False)
    rack(ids)


@pytest.mark.parametrize("methods", [["lora"], ["dora"], ["mora"], METHODS])
def test_folding_gives_plain_weights_and_the_names_from_before(rack, make_rack, ids, format, methods):
    stack = adapted(rack, format, *methods)
    plain = make_rack()
    with torch.no_grad():
        before = rack(ids)
        fold(stack)
        torch.testing.assert_close(rack(ids), before, **CLOSE)
    assert list(rack.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in rack.modules()] == [type(m) for m in plain.modules()]
    assert stack.adapters == ()
    assert stack.weight_format == "fp32"
    plain.load_state_dict(rack.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(ids), before, **CLOSE)


def test_folding_one_set_leaves_the_others(rack, ids):
    stack = adapted(rack, "nf4", "lora", "mora")
    with torch.no_grad():
        before = rack(ids)
        fold(stack, "lora")
        torch.testing.assert_close(rack(ids), before, **CLOSE)
    assert list(sets(stack)) == ["mora"]
    assert {adapter_set_of(n) for n in stack.state_dict()} == {None, "mora"}


def test_folding_a_set_of_few_layers_makes_the_whole_frozen_stack_plain(rack, ids):
    stack = adapted(rack, "nf4", "lora", targets=("q", "down"))
    with torch.no_grad():
        before = rack(ids)
        fold(stack)
        torch.testing.assert_close(rack(ids), before, **CLOSE)
    linears = [m for m in stack.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7
    assert all(type(m) is Linear and not m.weight.requires_grad for m in linears)


def test_folding_keeps_the_parameter_and_what_trains(rack):
    stack = rack.stacks[0]
    weight = stack.blocks[0].attn.q.weight
    adapted(rack, "fp32", "lora")
    expected = stack.blocks[0].attn.q.weight_with(["lora"])
    assert torch.equal(folded_weights(stack)["blocks.0.attn.q.weight"], expected)
    fold(stack)
    assert stack.blocks[0].attn.q.weight is weight
    assert torch.equal(weight, expected)
    assert weight.requires_grad


@pytest.mark.parametrize("merged", [None, "lora", "mora"])
def test_folding_beside_what_is_merged_gives_the_same(rack, ids, merged):
    stack = adapted(rack, "nf4", "lora", "mora")
    with torch.no_grad():
        before = rack(ids)
        merge(stack, merged)
        fold(stack, "lora")
        torch.testing.assert_close(rack(ids), before, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_merge_and_requantise_folds_into_the_stored_weights_and_starts_anew(rack, ids, format, method):
    stack = adapted(rack, format, method)
    layer = stack.blocks[0].ffn.gate
    wanted = layer.weight_with([method])
    started = {n: p.clone() for n, p in adapter_parameters(stack).items()}
    merge_and_requantise(stack, method, seed=3)
    assert stack.weight_format == format
    assert isinstance(layer.base_layer, FrozenLinear) == (format == "nf4")
    error = (layer.base_weight() - wanted).norm() / wanted.norm()
    assert error < (1e-6 if format == "fp32" else 0.15)
    assert torch.allclose(layer.get_delta_weight(method), torch.zeros_like(wanted), atol=1e-6)
    x = torch.randn(2, 24)
    torch.testing.assert_close(layer(x), x @ layer.base_weight().T, **CLOSE)
    assert all(not torch.equal(p, started[n]) for n, p in adapter_parameters(stack).items())
    if method == "lora":
        first = {n: p.clone() for n, p in adapter_parameters(stack).items()}
        for seed, restart in ((3, 2), (4, 1)):
            merge_and_requantise(stack, method, seed=seed, restart=restart)
            drawn = [n for n in first if ".lora_A." in n]
            assert not any(torch.equal(adapter_parameters(stack)[n], first[n]) for n in drawn)
        merge_and_requantise(stack, method, seed=3, restart=1)
        assert all(torch.equal(parameter, first[n]) for n, parameter in adapter_parameters(stack).items())


def test_requantising_gives_what_quantising_the_sum_gives(rack):
    stack = adapted(rack, "nf4", "lora")
    layer = stack.blocks[0].attn.q
    dense = torch.nn.Linear(24, 24, bias=False)
    dense.weight.data = layer.weight_with(["lora"])
    merge_and_requantise(stack, "lora")
    assert torch.equal(layer.base_weight(), FrozenLinear.of(dense, "nf4").weight)


def test_adapters_over_4_bits_lower_the_loss_and_change_no_stored_byte(rack, ids):
    full = sum(t.nbytes for n, t in rack.stacks[0].state_dict().items() if "norm" not in n) / 2
    rack.requires_grad_(False)
    for stack in rack.stacks:
        freeze_stack(stack, "nf4")
        attach(stack, AdapterSpec("stack", rank=4, alpha=8.0))
    stored = {n: t.clone() for n, t in rack.state_dict().items() if adapter_set_of(n) is None}
    optimizer = torch.optim.AdamW([p for p in rack.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(rack(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(t, stored[n]) for n, t in rack.state_dict().items() if n in stored)
    packed = sum(t.nbytes for n, t in stored.items() if n.startswith("stacks.s0.") and "norm" not in n)
    assert (
        packed < 0.35 * full
    )  # a quarter of fp16 and the scales, which weigh more in a matrix as small as this


def test_attaching_and_computing_unpack_a_stored_matrix_no_oftener_than_needed(rack, monkeypatch):
    stack = rack.stacks[0]
    freeze_stack(stack, "nf4")
    counted = []
    unpack = FrozenLinear.dequantised
    monkeypatch.setattr(FrozenLinear, "dequantised", lambda *a: counted.append(1) or unpack(*a))
    attach(stack, AdapterSpec("stack"))
    assert counted == []


@pytest.mark.parametrize("act", [merge, fold, merge_and_requantise])
def test_a_bottleneck_cannot_be_merged(rack, act):
    stack = adapted(rack, "fp32", "bottleneck")
    with pytest.raises(ValueError, match="is a bottleneck, which is not linear"):
        act(stack, "bottleneck")


@pytest.mark.parametrize("act", [fold, merge_and_requantise])
def test_a_dora_set_keeps_its_base(rack, ids, act):
    stack = adapted(rack, "fp32", "lora", "dora")
    before = {n: t.clone() for n, t in rack.state_dict().items()}
    with pytest.raises(ValueError, match="the DoRA set 'dora' of stack 's0' depends on the weight that lora"):
        act(stack, "lora")
    assert all(torch.equal(t, before[n]) for n, t in rack.state_dict().items())


@pytest.mark.parametrize("act", [merge, fold, merge_and_requantise])
def test_a_broken_set_is_not_merged(rack, act):
    stack = adapted(rack, "fp32", "lora")
    with torch.no_grad():
        adapter_parameters(stack)["blocks.0.ffn.down.lora_B.lora.weight"][0, 0] = float("nan")
    before = {n: t.clone() for n, t in rack.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks.0.ffn.down.lora_B.lora.weight of stack 's0' hold numbers"):
        act(stack, "lora")
    assert all(torch.equal(t, before[n]) for n, t in rack.state_dict().items() if "ffn.down.lora_B" not in n)


def test_requantising_beside_a_merged_set_keeps_the_output(rack, ids):
    stack = adapted(rack, "fp32", "lora", "mora")
    with torch.no_grad():
        before = rack(ids)
        merge(stack, "mora")
        merge_and_requantise(stack, "lora")
        torch.testing.assert_close(rack(ids), before, **CLOSE)
