"""Every attention preset in every factory, and latents and kernels beside growth, adapters, formats, plans and runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from stackwise import (
    ConfigError,
    ProgressiveRackBuilder,
    StackWiseConfig,
    create_rack_from_config,
    create_rack_from_specs,
    create_simple_rack,
    create_stack_from_config,
)
from stackwise.adapters.attach import attach
from stackwise.curriculum.growth import grow
from stackwise.curriculum.split import apply_training
from stackwise.curriculum.stage import Growth
from stackwise.inference.plan import uncovered
from stackwise.model.attention_settings import Preset
from stackwise.model.block import Context
from stackwise.model.describe import attention_options
from stackwise.model.init import start_spectral_norm
from stackwise.model.parts import KernelSpec
from stackwise.model.spec import AdapterSpec
from stackwise.model.spectral import add_spectral_norm
from stackwise.model.visibility import Visibility
from stackwise.objectives.causal import CausalLM
from stackwise.planning.live import LiveBytes
from stackwise.planning.situation import Situation
from stackwise.planning.trace import LIVE, full_trace, trace
from stackwise.precision.convert import freeze_stack, restore_full_precision
from stackwise.training.run import train
from stackwise.training.stored import open_run

CUSTOM = {"attention_type": "mla", "kernel_type": "gaussian", "attention_mode": "causal"}
PRESETS = {
    "bert_style": ("mha", False, 4, None),
    "gpt_style": ("mha", True, 4, None),
    "efficient_gqa": ("mha", False, 1, None),
    "mla_attention": ("mla", False, 4, None),
    "kernel_attention": ("mha", False, 4, "gaussian"),
    "mlgka": ("mla", False, 1, "laplacian"),
    "custom": ("mla", True, 4, "gaussian"),
}
"""Type, causal, key-value heads and kernel, as in the table of the specification."""


def root_config(preset):
    model = {
        "d_model": 16,
        "n_heads": 4,
        "d_ff": 24,
        "vocab_size": 29,
        "max_seq_len": 32,
        "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
        "attention_preset": preset,
    }
    if preset == "custom":
        model["attention_custom"] = CUSTOM
    return StackWiseConfig(model=model)


def simple(preset):
    custom = CUSTOM if preset == "custom" else None
    return create_simple_rack(2, 1, 16, 24, 4, 29, attention_preset=preset, attention_custom=custom)


def from_specs(preset):
    block = attention_options(preset, 16, 4, CUSTOM if preset == "custom" else None)
    rows = [{"stack_id": i, "n_blocks": 1, "block_spec": {"n_heads": 4, **block}} for i in range(2)]
    return create_rack_from_specs(29, 16, rows)


def built(preset):
    builder = ProgressiveRackBuilder(root_config(preset))
    for _ in range(2):
        builder.append_stack(n_blocks=1)
    return builder.build_rack()


FACTORIES = {
    "simple": simple,
    "config": lambda preset: create_rack_from_config(root_config(preset)),
    "specs": from_specs,
    "builder": built,
}


def test_the_table_lists_every_preset():
    assert set(PRESETS) == set(get_args(Preset))


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_in_every_factory(preset, factory):
    rack = FACTORIES[factory](preset)
    block = rack.spec.blocks[0]
    kernel = block.kernel.kind if block.kernel else None
    assert (block.attention_type, block.causal, block.n_kv_heads, kernel) == PRESETS[preset]
    assert len({replace(b, n_kv_heads=0) for b in rack.spec.blocks}) == 1
    ids = torch.randint(0, 29, (2, 9))
    apply_training(rack, {f"stack:{s.uid}" for s in rack.stacks} | {"embedding", "norm", "head"})
    F.cross_entropy(rack(ids).flatten(0, 1), ids.flatten()).backward()
    learned = [p.grad for stack in rack.stacks for p in stack.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in learned)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_in_a_stack_from_a_config(preset):
    stack = create_stack_from_config(0, 2, root_config(preset))
    x = torch.randn(2, 7, 16, requires_grad=True)
    stack(x, Context(Visibility(7), None, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *stack.parameters()))


def test_custom_without_fields_is_refused():
    with pytest.raises(ConfigError, match="attention_custom"):
        StackWiseConfig(model={"attention_preset": "custom"}).validate()
    with pytest.raises(ValueError, match="needs attention_custom"):
        create_simple_rack(1, 1, 16, 24, 4, 29, attention_preset="custom")


LINEAR = KernelSpec("gaussian", "linear", 8)
KINDS = {
    "mla": {"attention_preset": "mla_attention"},
    "kernel": {"attention_preset": "kernel_attention"},
    "mlgka": {"attention_preset": "mlgka"},
    "linear": {"attention_preset": "kernel_attention", "kernel": LINEAR},
    "mla linear": {"attention_preset": "mla_attention", "kernel": LINEAR},
}


def causal_rack(kind, stacks=2, **options):
    return create_simple_rack(stacks, 2, 32, 48, 4, 61, causal=True, max_seq_len=64, **KINDS[kind], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_stack_take_its_random_features_over(kind):
    rack = causal_rack(kind).eval()
    grown = grow(rack, Growth("append", 2, "copy"), seed=0)[0]
    old, new = (dict(grown.stacks[i].named_buffers()) for i in (1, 2))
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert bool(old) == (kind != "mla")
    fresh = dict(grow(rack, Growth("append", 2, "random"), seed=0)[0].stacks[2].named_buffers())
    assert not any(torch.equal(old[name], fresh[name]) for name in old)
    ids = torch.randint(0, 61, (2, 10))
    before = rack(ids)
    assert torch.equal(grow(rack, Growth("append", 2, "zero"), seed=0)[0](ids), before)


def decoded(rack, ids):
    """The last logits, by one token over a cache of all others."""
    with torch.no_grad():
        cache = rack.make_cache(ids.shape[0], ids.shape[1])
        rack(ids[:, :-1], cache=cache)
        return rack(ids[:, -1:], cache=cache)[:, 0]


@pytest.mark.parametrize("case", ["plain", "nf4", "spectral", "adapters", "merged", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_agrees_with_the_full_pass_whatever_the_layers_are(kind, case, monkeypatch):
    rack = causal_rack(kind).eval()
    calls = []
    if kind == "mla":
        absorbed = type(rack.stacks[0].blocks[0].attn)._absorbed
        monkeypatch.setattr(
            type(rack.stacks[0].blocks[0].attn), "_absorbed", lambda *args: calls.append(1) or absorbed(*args)
        )
    for stack in rack.stacks:
        if case == "nf4":
            freeze_stack(stack, "nf4")
        elif case == "spectral":
            add_spectral_norm(stack)
            start_spectral_norm(stack, 0)
        elif case in ("adapters", "merged", "dora"):
            attach(stack, AdapterSpec("stack", "dora" if case == "dora" else "lora", 4))
            for name, parameter in stack.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, 0.0, 0.05)
            if case == "merged":
                for layer in stack.modules():
                    if hasattr(layer, "merge"):
                        layer.merge()
    # in float64, for high frequencies enlarge the rounding of keys that are built anew
    rack.eval().double()
    ids = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        full = rack(ids)[:, -1]
    torch.testing.assert_close(decoded(rack, ids), full, rtol=1e-7, atol=1e-7)
    if kind == "mla":  # adapters that are not merged are more than a matrix
        assert len(calls) == (0 if case in ("adapters", "dora") else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_formats_leave_buffers_alone_and_can_be_undone(kind):
    rack = causal_rack(kind, stacks=1).eval()
    stack, ids = rack.stacks[0], torch.randint(0, 61, (2, 9))
    before, features = rack(ids), dict(stack.named_buffers())
    kept = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    freeze_stack(stack, "nf4")
    assert all(torch.equal(dict(stack.named_buffers())[name], tensor) for name, tensor in features.items())
    assert not torch.equal(rack(ids), before)
    restore_full_precision(stack, kept)
    assert torch.equal(rack(ids), before)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_count_them_as_they_run(kind):
    rack = causal_rack(kind, stacks=3)
    assert uncovered(rack) is not None
    units = frozenset({"stack:s1", "stack:s2", "norm", "head"})
    situation = Situation(rack.spec, units, 3, 32)
    planned = trace(situation)
    assert planned == full_trace(situation)
    split = apply_training(rack, units)
    with LiveBytes([*rack.parameters(), *rack.buffers()]) as live:
        ids = torch.randint(0, 61, (3, 32))
        example = CausalLM().corrupt({"input_ids": ids, "next_ids": ids[:, 0].clone()})
        hidden = rack.forward_features(example.input_ids, prefix=split.prefix)
        loss = CausalLM().loss(hidden, rack.head, example)[0]
        del hidden
        loss.backward()
    assert planned.most[LIVE] == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize(
    "kind",
    [
        {"attention_preset": "mla_attention"},
        {"attention_preset": "mlgka", "attention_overrides__kernel_dim": 8},
        {"attention_preset": "kernel_attention", "attention_overrides__kernel_mode": "linear"},
    ],
    ids=lambda kind: kind["attention_preset"],
)
def test_progressive_runs_with_packed_documents_and_stored_trunks_learn_and_generate(tiny, kind):
    keys = {f"model__{key}": value for key, value in kind.items()}
    result = train(
        tiny(
            **keys,
            model__n_heads=4,
            model__attention_overrides__attention_mode="causal",
            training__progressive__trunk_precision="nf4",
            training__progressive__joint_tuning=False,
            training__progressive__cache_activations=True,
            training__max_steps=12,
            training__optimizer__lr=1e-2,
        ),
        sinks=[],
    )
    opened = open_run(result["run_dir"])
    assert [stack.weight_format for stack in opened.rack.spec.stacks] == ["nf4", "nf4", "fp32"]
    assert result["eval_loss"] < 0.9 * math.log(opened.rack.spec.vocab_size)
    if "kernel_mode" in str(kind) or "mlgka" in str(kind):  # stacks that start as copies share their features
        features = [b for n, b in opened.rack.named_buffers() if n.endswith("kernel.features")]
        assert len(features) == 4
        assert all(torch.equal(features[0], other) for other in features[1:3])
