"""Adapters on a rack that is built by hand, and on stacks that grow out of adapted ones."""

from __future__ import annotations

import pytest
import torch

from stackwise import CheckpointError, ProgressiveRackBuilder, StackWiseConfig
from stackwise.adapters.attach import adapter_parameters, sets
from stackwise.curriculum.growth import grow
from stackwise.curriculum.stage import Growth
from stackwise.model.linear import Linear
from stackwise.model.names import adapter_set_of
from stackwise.model.spec import AdapterSpec

from .conftest import teach


def make(n_stacks: int = 0, **progressive) -> ProgressiveRackBuilder:
    model = {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40, "vocab_size": 31}
    sections = {"model": {**model, "architecture": {"blocks_per_stack": 1}}}
    builder = ProgressiveRackBuilder(
        StackWiseConfig.from_dict({**sections, "training": {"progressive": progressive}})
    )
    for _ in range(n_stacks):
        builder.append_stack()
    return builder


def sizes(builder) -> list[dict[str, int]]:
    return [
        {name: size["rank"] for name, size in builder.get_stack_info(i)["lora"].items()}
        for i in range(builder.n_stacks)
    ]


def test_three_stacks_and_their_sets(ids):
    builder = make(qlora_enabled=True, progressive_qlora=True)
    builder.append_stack()
    outputs = [builder.build_rack().eval()(ids)]
    assert sizes(builder) == [{"stack": 16}]
    builder.append_stack()
    assert sizes(builder) == [{"stack": 16, "trunk": 8}, {"stack": 16}]
    builder.append_stack()
    assert sizes(builder) == [{"stack": 16, "trunk": 8}, {"stack": 16, "trunk": 8}, {"stack": 16}]
    rack = builder.build_rack().eval()
    outputs.append(rack(ids))
    for stack in rack.stacks:
        layers = {n.partition(".lora_A")[0] for n in adapter_parameters(stack, "stack") if ".lora_A." in n}
        assert len(layers) == 7
    names = {adapter_set_of(name) for name in rack.state_dict()}
    assert names == {None, "stack", "trunk"}
    bare = make(3).build_rack().eval()
    assert torch.equal(bare(ids), outputs[1])
    assert rack.spec.stacks == tuple(stack.spec for stack in rack.stacks)
    assert sizes(make(3, qlora_enabled=True)) == [{"stack": 16}] * 3
    assert sizes(make(3)) == [{}] * 3


def test_prepended_stacks_are_adapted_alike_and_sets_stay_on_their_stacks():
    builder = make(1, qlora_enabled=True, progressive_qlora=True)
    new = builder.prepend_stack(qlora_rank=5, qlora_alpha=7.0)
    assert sizes(builder) == [{"stack": 5}, {"stack": 16, "trunk": 8}]
    assert new.adapters[0] == AdapterSpec("stack", rank=5, alpha=7.0, dropout=0.1)
    assert builder.get_stack_info(0)["lora"] == {"stack": {"rank": 5, "alpha": 7.0}}
    assert [builder.get_stack_info(i)["qlora_rank"] for i in (0, 1)] == [5, 16]


def test_a_rank_of_its_own_gives_a_set_where_the_config_has_none():
    builder = make(1)
    builder.append_stack(qlora_rank=4)
    builder.append_stack(qlora_alpha=3.0)
    assert sizes(builder) == [{}, {"stack": 4}, {"stack": 16}]
    assert builder.get_stack_info(0)["qlora_rank"] is None


def test_ranks_follow_the_order_of_building():
    builder = make(qlora_enabled=True, qlora_strategy="progressive", qlora_rank_pattern="linear")
    for side in ("append", "prepend", "append"):
        getattr(builder, f"{side}_stack")()
    assert sizes(builder) == [{"stack": 24}, {"stack": 16}, {"stack": 32}]


@pytest.mark.parametrize("side", ["append", "prepend"])
@pytest.mark.parametrize("wrong", [{"qlora_rank": 0}, {"qlora_alpha": 0.0}])
def test_a_wrong_rank_adds_no_stack(side, wrong):
    builder = make(1)
    with pytest.raises(ValueError, match="got 0"):
        getattr(builder, f"{side}_stack")(**wrong)
    assert builder.n_stacks == 1


def test_in_merge_mode_trunk_sets_are_folded_in_when_the_next_stack_arrives(ids):
    builder = make(2, qlora_enabled=True, progressive_qlora=True, trunk_lora_mode="merge")
    rack = builder.build_rack().eval()
    teach(rack.stacks[0], "trunk", 0.1)
    before = rack(ids)
    weight = rack.stacks[0].blocks[0].attn.q.weight.clone()
    first = {n: p.clone() for n, p in adapter_parameters(rack.stacks[0], "trunk").items()}
    builder.append_stack(stack=zero_stack(rack))
    after = builder.build_rack().eval()
    torch.testing.assert_close(after(ids), before, atol=1e-5, rtol=1e-5)
    assert not torch.equal(after.stacks[0].blocks[0].attn.q.weight, weight)
    own = adapter_parameters(after.stacks[0], "trunk")
    assert all(not torch.equal(own[n], first[n]) for n in own)
    assert all((p == 0).all() for n, p in own.items() if ".lora_B." in n)


def zero_stack(rack):
    """A stack that is the identity."""
    from stackwise.curriculum.growth import zero_outputs
    from stackwise.model.block import Stack

    stack = Stack.from_spec(rack.spec.stacks[0], 0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.fill_(0.1)
    zero_outputs(stack)
    return stack


def test_add_and_merge_leave_the_output_and_give_plain_layers_back(ids):
    builder = make(2)
    rack = builder.build_rack().eval()
    before = rack(ids)
    builder.add_lora(0, rank=3, alpha=6.0)
    builder.add_lora(-1, rank=2, alpha=1.0, name="own")
    assert sizes(builder) == [{"stack": 3}, {"own": 2}]
    assert torch.equal(rack(ids), before)
    for stack in rack.stacks:
        teach(stack, None, 0.1)
    taught = rack(ids)
    assert (taught - before).abs().max() > 1e-3
    builder.merge_lora(0)
    torch.testing.assert_close(rack(ids), taught, atol=1e-5, rtol=1e-5)
    assert sizes(builder) == [{}, {"own": 2}]
    builder.merge_lora(name="own")
    torch.testing.assert_close(rack(ids), taught, atol=1e-5, rtol=1e-5)
    assert sizes(builder) == [{}, {}]
    assert all(type(m) is Linear for s in rack.stacks for m in s.modules() if isinstance(m, torch.nn.Linear))
    assert rack.spec.stacks == tuple(stack.spec for stack in rack.stacks)


def test_the_config_says_what_added_sets_are():
    builder = make(1, qlora_method="mora", qlora_dropout=0.3, qlora_target_modules="q")
    builder.add_lora(0, 2, 4.0, "trunk")
    assert builder.build_rack().stacks[0].adapters == (AdapterSpec("trunk", "mora", 2, 4.0, 0.3, ("q",)),)


def test_only_adapters_train_after_freeze_all_but_qlora(ids):
    builder = make(2, qlora_enabled=True, progressive_qlora=True)
    rack = builder.build_rack()
    for stack in rack.stacks:
        stack.trained = True
    count = builder.freeze_all_but_qlora()
    trainable = {n: p for n, p in rack.named_parameters() if p.requires_grad}
    assert all(adapter_set_of(name) for name in trainable)
    assert count == sum(p.numel() for p in trainable.values())
    assert count == sum(s["parameters"] for stack in rack.stacks for s in sets(stack).values())
    rack(ids).square().mean().backward()
    assert all((p.grad is None) == (n not in trainable) for n, p in rack.named_parameters())
    assert builder.freeze_all_but_qlora(0) == sum(s["parameters"] for s in sets(rack.stacks[0]).values())
    assert {n.split(".")[1] for n, p in rack.named_parameters() if p.requires_grad} == {"s0"}


def test_adapters_alone_over_weights_that_never_learned_are_warned_about():
    builder = make(1, qlora_enabled=True)
    with pytest.warns(UserWarning, match="stack 0 sit on weights that no run has trained"):
        builder.freeze_all_but_qlora()


def test_an_adapted_rack_comes_back_from_its_file(ids, tmp_path):
    builder = make(2, qlora_enabled=True, progressive_qlora=True)
    rack = builder.build_rack().eval()
    teach(rack.stacks[0])
    builder.save_rack(tmp_path / "rack.safetensors")
    other = make()
    assert other.load_rack(tmp_path / "rack.safetensors")
    assert torch.equal(other.build_rack().eval()(ids), rack(ids))
    assert sizes(other) == sizes(builder)
    with pytest.raises(CheckpointError, match=r"missing stacks.s0.*lora_A|unexpected stacks.s0.*lora_A"):
        make(2).load_rack(tmp_path / "rack.safetensors")


def test_what_the_builder_refuses():
    builder = make(2)
    builder.add_lora(0, 2, 4.0)
    with pytest.raises(ValueError, match="has an adapter set 'stack' already"):
        builder.add_lora(0, 2, 4.0)
    with pytest.raises(ValueError, match="rank of an adapter set must be at least 1, got 0"):
        builder.add_lora(1, 0, 4.0)
    for call in (
        lambda: builder.add_lora(99, 1, 1.0),
        lambda: builder.merge_lora(99),
        lambda: builder.freeze_all_but_qlora(99),
    ):
        with pytest.raises(IndexError, match="stack 99 of a rack of 2 stacks"):
            call()
    with pytest.raises(ValueError, match=r"no adapters on stack 1, .* call add_lora first"):
        builder.freeze_all_but_qlora()
    with pytest.raises(ValueError, match="nothing to merge: no adapters on stack 1"):
        builder.merge_lora(1)
    with pytest.raises(ValueError, match="nothing to merge: no adapter set 'trunk' on any stack"):
        builder.merge_lora(name="trunk")


def test_nothing_is_merged_where_one_stack_cannot_be(ids):
    builder = make(2)
    builder.add_lora(0, 2, 4.0)
    builder.config.training.progressive.qlora_method = "bottleneck"
    builder.add_lora(1, 2, 4.0)
    with pytest.raises(ValueError, match="is a bottleneck"):
        builder.merge_lora()
    assert sizes(builder) == [{"stack": 2}, {"stack": 2}]


@pytest.mark.parametrize("op", ["append", "prepend"])
@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_a_copy_of_an_adapted_stack_starts_with_what_the_adapters_have_learned(ids, op, method):
    builder = make(1, qlora_enabled=True, qlora_method=method)
    rack = builder.build_rack().eval()
    teach(rack.stacks[0], None, 0.1)
    grown, _ = grow(rack, Growth(op, 1, "copy"), seed=0)
    old = next(stack for stack in grown.stacks if stack.uid == "s0").eval()
    new = next(stack for stack in grown.stacks if stack.uid == "s1").eval()
    assert new.adapters == ()
    x, context = torch.randn(3, 7, 24), grown.make_context(ids)
    torch.testing.assert_close(new(x, context), old(x, context), atol=1e-5, rtol=1e-5)
