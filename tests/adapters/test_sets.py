"""Named sets on the linear layers of a stack."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stackwise.adapters.attach import adapter_parameters, attach, remove, sets
from stackwise.adapters.low_rank import low_rank, low_rank_reference
from stackwise.adapters.merge import merge
from stackwise.model.names import adapter_set_of, set_modules
from stackwise.model.spec import AdapterSpec

from .conftest import teach

LAYERS = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("method", ["lora", "mora", "bottleneck"])
def test_attaching_changes_no_bit_of_the_output(rack, ids, method):
    before = rack(ids)
    for stack in rack.stacks:
        attach(stack, AdapterSpec("stack", method, rank=5))
        attach(stack, AdapterSpec("trunk", method, rank=3))
    assert torch.equal(rack(ids), before)


def test_attaching_dora_changes_the_output_by_rounding_only(rack, ids):
    before = rack(ids)
    attach(rack.stacks[0], AdapterSpec("stack", "dora"))
    torch.testing.assert_close(rack(ids), before, atol=1e-6, rtol=1e-6)


def test_all_linear_means_every_linear_layer_of_attention_and_feed_forward(rack):
    attach(rack.stacks[1], AdapterSpec("stack", rank=2))
    paths = {
        name.partition(".lora_A")[0] for name in adapter_parameters(rack.stacks[1]) if ".lora_A." in name
    }
    assert paths == {f"blocks.0.{layer}" for layer in LAYERS}
    assert adapter_parameters(rack.stacks[0]) == {}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("q",), ["attn.q"]),
        (("attn.v", "up"), ["attn.v", "ffn.up"]),
        ((r".*\.(gate|down)",), ["ffn.gate", "ffn.down"]),
        ((r"blocks\.0\.attn\..", "gate"), ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate"]),
    ],
)
def test_targets_are_names_or_expressions(rack, targets, layers):
    attach(rack.stacks[0], AdapterSpec("stack", rank=2, targets=targets))
    found = {n.partition(".lora_A")[0] for n in adapter_parameters(rack.stacks[0]) if ".lora_A." in n}
    assert found == {f"blocks.0.{layer}" for layer in layers}


@pytest.mark.parametrize("rslora", [False, True])
def test_two_sets_equal_the_formula(rack, rslora):
    stack = rack.stacks[0]
    base = stack.blocks[0].attn.k
    attach(stack, AdapterSpec("stack", rank=5, alpha=7.0, rslora=rslora))
    attach(stack, AdapterSpec("trunk", rank=2, alpha=3.0))
    teach(stack)
    layer = stack.blocks[0].attn.k.double()
    x = torch.randn(4, 6, 24, dtype=torch.float64)
    expected = x @ base.weight.T
    for name, rank, scale in (("stack", 5, 7 / 5**0.5 if rslora else 7 / 5), ("trunk", 2, 3 / 2)):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        assert a.shape == (rank, 24)
        assert b.shape == (12, rank)
        expected = expected + scale * x @ (b @ a).T
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


def test_two_sets_equal_peft(rack, make_rack, ids):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    theirs = make_rack()
    for name, rank, alpha in (("stack", 5, 7), ("trunk", 2, 3)):
        for stack in rack.stacks:
            attach(stack, AdapterSpec(name, rank=rank, alpha=alpha))
        with pytest.warns() if name == "trunk" else _nothing():
            inject_adapter_in_model(
                LoraConfig(r=rank, lora_alpha=alpha, target_modules=[x.split(".")[1] for x in LAYERS]),
                theirs,
                name,
            )
    for stack in rack.stacks:
        teach(stack)
    own = dict(rack.named_parameters())
    for layer in theirs.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(["stack", "trunk"])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(own[name])
    # in float64, where the order of sums does not show
    torch.testing.assert_close(rack.double()(ids), theirs.double()(ids), atol=1e-10, rtol=1e-10)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_dropout_acts_on_the_input_of_a_set_and_only_in_training(rack):
    stack = rack.stacks[0]
    attach(stack, AdapterSpec("stack", rank=4, alpha=4.0, dropout=0.5))
    teach(stack)
    layer = stack.blocks[0].attn.q
    x = torch.randn(2, 24)
    a, b = layer.lora_A["stack"].weight, layer.lora_B["stack"].weight
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(got, layer.base_layer(x) + dropped @ (b @ a).T)
    for module in set_modules(stack, "stack"):
        module.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ (b @ a).T)


def test_sets_of_a_frozen_stack_start_in_eval_mode(rack):
    rack.stacks[0].freeze_all()
    attach(rack.stacks[0], AdapterSpec("trunk", dropout=0.5))
    attach(rack.stacks[0], AdapterSpec("other", dropout=0.5, targets=("q",)))
    remove(rack.stacks[0], "other")
    attach(rack.stacks[0], AdapterSpec("other", dropout=0.5))
    assert not any(module.training for module in rack.stacks[0].modules())
    remove(rack.stacks[0], "other")
    assert {n for n, p in rack.stacks[0].named_parameters() if p.requires_grad} == set(
        adapter_parameters(rack.stacks[0], "trunk")
    )


def test_first_values_follow_the_seed_and_the_name_alone(make_rack):
    def first(seed, order, noise):
        rack = make_rack()
        torch.manual_seed(noise)
        for index in order:
            attach(rack.stacks[index], AdapterSpec("stack", rank=3), seed=seed)
        return {n: p.clone() for n, p in rack.named_parameters() if adapter_set_of(n)}

    one, other = first(1, [0, 1], noise=5), first(1, [1, 0], noise=6)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    drawn = [n for n in one if ".lora_A." in n]
    assert not any(torch.equal(one[n], first(2, [0, 1], 5)[n]) for n in drawn)
    assert not torch.equal(one[drawn[0]], one[drawn[0].replace("s0", "s1")])
    spread = torch.cat([one[n].flatten() for n in drawn if "down" not in n])
    assert spread.abs().max() <= 24**-0.5
    torch.testing.assert_close(spread.std(), torch.tensor((24 * 3) ** -0.5), rtol=0.1, atol=0)


def test_attaching_leaves_the_global_generators_alone(rack):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for method in ("lora", "dora", "mora", "bottleneck"):
        attach(rack.stacks[0], AdapterSpec(method, method))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_set_leaves_what_trains_and_the_values_as_they_are(rack):
    stack = rack.stacks[0]
    attach(stack, AdapterSpec("stack"))
    for parameter in stack.parameters():
        parameter.requires_grad_(False)
    before = tensors_of(stack)
    attach(stack, AdapterSpec("trunk"))
    after = stack.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {adapter_set_of(n) for n, p in stack.named_parameters() if p.requires_grad} == {"trunk"}


def test_gradients_reach_only_the_chosen_set_and_a_step_keeps_the_base_bytes(rack, ids):
    for stack in rack.stacks:
        attach(stack, AdapterSpec("stack", rank=2))
        attach(stack, AdapterSpec("trunk", rank=2))
        teach(stack)
    for name, parameter in rack.named_parameters():
        parameter.requires_grad_(adapter_set_of(name) == "trunk" and name.startswith("stacks.s0"))
    before = tensors_of(rack)
    rack(ids).square().mean().backward()
    chosen = {n for n, p in rack.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert chosen == {f"stacks.s0.{name}" for name in adapter_parameters(rack.stacks[0], "trunk")}
    torch.optim.SGD([p for p in rack.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, tensor in rack.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == chosen


def test_names_of_the_base_do_not_change(rack):
    plain = list(rack.state_dict())
    attach(rack.stacks[0], AdapterSpec("stack", rank=2, targets=("q", "down")))
    names = list(rack.state_dict())
    assert [n for n in names if adapter_set_of(n) is None] == plain
    assert names == [n for n, _ in rack.named_parameters()]
    assert "stacks.s0.blocks.0.attn.q.lora_A.stack.weight" in names


def test_a_state_dict_goes_into_a_rack_with_the_same_sets_and_without(rack, make_rack, ids):
    attach(rack.stacks[0], AdapterSpec("stack", rank=2))
    teach(rack.stacks[0])
    twin, bare = make_rack(seed=1), make_rack(seed=2)
    attach(twin.stacks[0], AdapterSpec("stack", rank=2))
    twin.load_state_dict(rack.state_dict())
    assert torch.equal(twin(ids), rack(ids))
    result = bare.load_state_dict(rack.state_dict(), strict=False)
    assert result.missing_keys == []
    assert {adapter_set_of(name) for name in result.unexpected_keys} == {"stack"}
    remove(rack.stacks[0], "stack")
    assert torch.equal(bare(ids), rack(ids))


def test_removing_gives_plain_layers_back(rack, ids):
    plain, before = rack(ids), {n: type(m) for n, m in rack.named_modules()}
    attach(rack.stacks[0], AdapterSpec("stack", "dora"))
    attach(rack.stacks[0], AdapterSpec("trunk", "mora", targets=("q",)))
    teach(rack.stacks[0])
    remove(rack.stacks[0], "stack")
    assert rack.stacks[0].adapters == (AdapterSpec("trunk", "mora", targets=("q",)),)
    assert {adapter_set_of(n) for n in rack.state_dict()} == {None, "trunk"}
    assert not torch.equal(rack(ids), plain)
    remove(rack.stacks[0])
    assert {n: type(m) for n, m in rack.named_modules()} == before
    assert torch.equal(rack(ids), plain)
    assert rack.stacks[0].adapters == ()


def test_removing_a_merged_set_takes_it_out(rack, ids):
    attach(rack.stacks[0], AdapterSpec("stack"))
    rack.requires_grad_(False)
    before = rack(ids)
    attach(rack.stacks[0], AdapterSpec("trunk"))
    teach(rack.stacks[0], "trunk")
    merge(rack.stacks[0])
    remove(rack.stacks[0], "trunk")
    torch.testing.assert_close(rack(ids), before, atol=1e-5, rtol=1e-5)
    assert rack.stacks[0].blocks[0].attn.q.merged_adapters == ["stack"]


def test_sets_say_what_they_are(rack):
    attach(rack.stacks[0], AdapterSpec("stack", rank=5, alpha=7.0))
    attach(rack.stacks[0], AdapterSpec("trunk", "bottleneck", rank=3))
    sizes = sum(n + m for n, m in [(24, 24), (12, 24), (12, 24), (24, 24), (40, 24), (40, 24), (24, 40)])
    assert sets(rack.stacks[0]) == {
        "stack": {"method": "lora", "rank": 5, "alpha": 7.0, "parameters": 5 * sizes},
        "trunk": {"method": "bottleneck", "rank": 3, "alpha": 32.0, "parameters": 2 * (2 * 24 * 3 + 24 + 3)},
    }
    assert sets(rack.stacks[1]) == {}


def test_sets_are_built_on_the_meta_device(make_rack):
    with torch.device("meta"):
        rack = make_rack()
    for method in ("lora", "dora", "mora", "bottleneck"):
        attach(rack.stacks[0], AdapterSpec(method, method))
    assert all(tensor.is_meta for tensor in rack.state_dict().values())
    real = make_rack()
    for method in ("lora", "dora", "mora", "bottleneck"):
        attach(real.stacks[0], AdapterSpec(method, method))
    assert {n: t.shape for n, t in rack.state_dict().items()} == {
        n: t.shape for n, t in real.state_dict().items()
    }


@pytest.mark.parametrize("method", ["lora", "dora", "mora", "bottleneck"])
def test_sets_stay_fp32_and_compute_in_fp32_under_autocast(rack, method):
    stack = rack.stacks[0]
    attach(stack, AdapterSpec("stack", method, rank=4, alpha=4.0))
    teach(stack)
    layer = stack.blocks[0].attn.o
    x = torch.randn(5, 24).bfloat16().float()
    change = layer(x) - layer.base_layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        if method in ("lora", "mora"):
            calls = []
            layer.base_layer.register_forward_hook(lambda *_: calls.append(1) or torch.zeros(5, 24))
            torch.testing.assert_close(layer(x.bfloat16()), change, atol=1e-6, rtol=1e-6)
            assert calls
        y = layer(x.bfloat16())
        y.float().square().sum().backward()
    for parameter in adapter_parameters(stack).values():
        assert parameter.dtype == torch.float32
    assert all(p.grad is not None for n, p in layer.named_parameters() if adapter_set_of(n))


def test_the_low_rank_product_and_its_gradients_are_those_of_autograd():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: low_rank(*t, 1.7), (x, a, b))
    torch.testing.assert_close(low_rank(x, a, b, 1.7), low_rank_reference(x, a, b, 1.7))
    half = x.detach().bfloat16().requires_grad_()
    low_rank(half, a.detach().float().requires_grad_(), b.detach().float(), 1.7).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_a_rack_without_sets_does_not_import_peft():
    code = (
        "import sys, torch; from stackwise.adapters.attach import sets, remove; from stackwise.adapters.ranks import set_of\n"
        "from stackwise import create_simple_rack\n"
        "rack = create_simple_rack(2, 1, 16, 32, 2, 17); rack(torch.zeros(1, 3, dtype=torch.int64))\n"
        "assert sets(rack.stacks[0]) == {}; remove(rack.stacks[0])\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
