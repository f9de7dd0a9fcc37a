"""Adapters in the stages of a run: which sets there are, and what a step over an adapted trunk changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stackwise.curriculum.assemble import build_rack, realise
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import apply_training, trained_units
from stackwise.model.names import adapter_set_of
from stackwise.training.optim_rules import rule_for


def program(config):
    config.model.vocab_size = 31
    run = stages(config, steps_per_epoch=10)
    return run, stage_specs(config, run, first_spec(config, run), "nf4")


def adapted(tiny, **changes):
    keys = {"qlora_enabled": True, "progressive_qlora": True, "trunk_strategy": "qlora", **changes}
    return tiny(**{f"training__progressive__{key}": value for key, value in keys.items()})


def test_the_sets_of_every_stage(tiny):
    _, specs = program(adapted(tiny))
    sets = [[{s.name: s.rank for s in stack.adapters} for stack in spec.stacks] for spec in specs[:3]]
    both = {"stack": 16, "trunk": 8}
    assert sets == [[{"stack": 16}], [both, {"stack": 16}], [both, both, {"stack": 16}]]
    _, specs = program(adapted(tiny, progressive_qlora=False))
    assert {s.name for spec in specs for stack in spec.stacks for s in stack.adapters} == {"stack"}
    _, specs = program(tiny())
    assert not any(stack.adapters for spec in specs for stack in spec.stacks)


@pytest.mark.parametrize("method", ["lora", "dora", "mora", "bottleneck"])
def test_a_step_over_an_adapted_trunk_changes_its_sets_and_the_new_stack_alone(tiny, method):
    config = adapted(tiny, qlora_method=method, global_head_blocks=0)
    run, specs = program(config)
    rack = build_rack(specs[0])
    for stage, spec in zip(run[1:3], specs[1:3], strict=True):
        rack, _ = realise(rack, stage, spec, seed=0)
    units = trained_units(specs[2], run[2])
    split = apply_training(rack, units)
    assert split.prefix == 1, (
        "gradients reach the adapters of the first stack, so only the embedding is ahead of them"
    )
    before = {name: tensor.clone() for name, tensor in rack.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in rack.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # A moves in the second step, when B is no longer zero
        optimizer.zero_grad()
        rack(torch.randint(0, 31, (2, 9))).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in rack.state_dict().items() if not torch.equal(tensor, before[name])}
    trunk = {name for name in before if name.startswith(("stacks.s0.", "stacks.s1."))}
    assert {adapter_set_of(name) for name in changed & trunk} == {"stack", "trunk"}
    assert changed & trunk == {name for name in trunk if adapter_set_of(name)}
    assert {"stacks.s2.blocks.0.attn.q.weight", "norm.weight", "head.weight"} <= changed
    assert "embedding.weight" not in changed
    frozen = [stack.weight_format for stack in rack.stacks]
    assert frozen == ["nf4", "nf4", "fp32"]


def test_adapters_train_at_a_rate_of_their_own(tiny):
    config = adapted(tiny, qlora_lr=0.25)
    run, specs = program(config)
    rack = build_rack(specs[1])
    newest, stage = rack.stacks[1].uid, run[1]
    rates = {
        (adapter_set_of(name), name.split(".")[1] if name.startswith("stacks") else ""): rule_for(
            name, parameter, stage, newest, config.training
        ).lr
        for name, parameter in rack.named_parameters()
    }
    assert {rate for (name, _), rate in rates.items() if name is not None} == {0.25}
    assert {rate for (name, _), rate in rates.items() if name is None} == {3e-3}
    own = rule_for(
        "stacks.s0.lora_A.stack.weight",
        torch.zeros(1),
        replace(stage, adapter_lr=0.5),
        newest,
        config.training,
    )
    assert own.lr == 0.5


def test_a_rack_is_rebuilt_from_its_description(tiny):
    run, specs = program(adapted(tiny, trunk_lora_mode="merge"))
    rack = build_rack(specs[0])
    for stage, spec in zip(run[1:3], specs[1:3], strict=True):
        rack, _ = realise(rack, stage, spec, seed=0, merge_trunk=True)
    twin = build_rack(specs[2])
    twin.load_state_dict(rack.state_dict())
    ids = torch.randint(0, 31, (2, 9))
    assert torch.equal(twin.eval()(ids), rack.eval()(ids))
    assert rack.spec == twin.spec == specs[2]
