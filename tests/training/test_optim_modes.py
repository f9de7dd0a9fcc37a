"""Modes of the optimizer's memory: what each holds, and that it steps, stops and goes on as it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackwise.curriculum.split import apply_training, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.objectives.causal import CausalLM
from stackwise.training import optim_state
from stackwise.training.optim import Optimizers, carried
from stackwise.training.optim_bytes import parameter_bytes
from stackwise.training.optim_rules import FEWEST, rule_for

MODES = ("full", "int8", "int8_nomaster", "fused")
VOCAB = 80
ALL = ("all",)
APPEND = ("new", "tail", "norm", "head")


def settings(tiny, **changes):
    options = {"training__max_grad_norm": 0.0, "model__d_model": 64, "model__vocab_size": VOCAB}
    names = {k: v for k, v in changes.items() if "__" in k}
    opt = {f"training__optimizer__{k}": v for k, v in changes.items() if "__" not in k}
    return tiny(**{**options, **opt, **names})


def make(tiny, trains=ALL, **changes) -> tuple[Rack, Optimizers]:
    config = settings(tiny, **changes)
    rack = Rack(rack_spec(config, 2), seed=3)
    return rack, over(rack, config, trains)


def over(rack: Rack, config, trains=ALL) -> Optimizers:
    stage = Stage("s", 2, trains, 10)
    apply_training(rack, trained_units(rack.spec, stage))
    return Optimizers(rack, stage, config.training)


def batch(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(step))


def steps(rack: Rack, optimizers: Optimizers, first: int, last: int) -> list[float]:
    """Train on fixed random tokens; the norms of the gradients."""
    objective, norms = CausalLM(), []
    for step in range(first, last):
        optimizers.set_factor(1.0, step)
        example = objective.corrupt({"input_ids": batch(step)})
        with torch.autocast("cpu", torch.bfloat16), optimizers.in_backward():
            total, count = objective.loss(rack.forward_features(example.input_ids), rack.head, example)
            (total / count).backward()
        norms.append(float(optimizers.gradient_norm()))
        optimizers.step()
        optimizers.zero_grad()
    return norms


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def flat(optimizers: Optimizers) -> dict[str, Tensor]:
    return {
        f"{name}::{key}": value for name, held in optimizers.state().items() for key, value in held.items()
    }


# --- what is held ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(("trains", "place"), [(ALL, "device"), (APPEND, "host")])
def test_bytes_are_planned_to_the_byte(tiny, kind, memory, trains, place):
    changes = {"optimizer_type": kind, "memory": memory, "model__short_conv": 3, "model__bias": True}
    changes["state_device"] = place
    config = settings(tiny, **changes)
    with torch.device("meta"):
        planned_rack = Rack(rack_spec(config, 2))
    apply_training(planned_rack, trained_units(planned_rack.spec, Stage("s", 2, trains, 1)))
    rack, optimizers = make(tiny, trains, **changes)
    gradients: dict[str, int] = {}

    def keep() -> None:
        gradients.update({n: p.grad.nbytes for n, p in rack.named_parameters() if p.grad is not None})

    optimizers.zero_grad = keep  # type: ignore[method-assign]
    steps(rack, optimizers, 0, 1)
    state = optimizers.state()
    counters = {n: sum(t.nbytes for t in held.values() if not t.dim()) for n, held in state.items()}
    moments = {n: sum(t.nbytes for t in held.values() if t.dim()) for n, held in state.items()}
    held = dict(rack.named_parameters())
    for name, parameter in planned_rack.named_parameters():
        if parameter.requires_grad:
            planned = parameter_bytes(name, parameter, config.training.optimizer)
            assert (planned.weights, planned.moments) == (held[name].nbytes, moments[name]), name
            assert planned.counters == counters[name], name
            assert planned.gradients == (held[name].nbytes if memory == "fused" else gradients[name]), name
    assert gradients == {} or memory != "fused"
    assert state.keys() == {n for n, p in rack.named_parameters() if p.requires_grad}
    assert optimizers.state_bytes() == sum(moments.values()) + sum(counters.values())
    assert optimizers.host_bytes() == (sum(moments.values()) if place == "host" else 0)


@pytest.mark.parametrize(
    ("memory", "expected"), [("full", 16), ("int8", 10), ("int8_nomaster", 6), ("fused", 4)]
)
def test_a_large_matrix_takes_the_bytes_of_the_table(tiny, memory, expected):
    """16, 10, 6 and 4 per number, and for eight bits 8 / 256 more; under fused one gradient is alive at a time."""
    rack, optimizers = make(tiny, memory=memory)
    steps(rack, optimizers, 0, 1)
    name = "stacks.s0.blocks.0.ffn.up.weight"
    weight = dict(rack.named_parameters())[name]
    assert weight.numel() >= FEWEST
    moments = sum(t.nbytes for k, t in optimizers.state()[name].items() if k != "step")
    gradient = 0 if memory == "fused" else weight.nbytes
    scales = 0 if memory == "full" else 2 * 4 * -(-weight.numel() // 256)
    assert weight.nbytes + gradient + moments - scales == expected * weight.numel()


def test_small_tensors_positions_and_convolutions_keep_fp32_weights(tiny):
    rack, optimizers = make(
        tiny,
        memory="int8_nomaster",
        model__pos_encoding="learned",
        model__use_rope=False,
        model__max_seq_len=128,
        model__short_conv=70,
    )
    steps(rack, optimizers, 0, 1)
    state = optimizers.state()
    for name, parameter in rack.named_parameters():
        large = parameter.numel() >= FEWEST
        matrix = large and not name.startswith("positions") and "_conv" not in name
        assert parameter.dtype == (torch.bfloat16 if matrix else torch.float32), name
        assert (state[name]["exp_avg"].dtype == torch.uint8) == large, name
    assert state["positions.weight"]["exp_avg"].dtype == torch.uint8
    assert state["stacks.s0.blocks.0.attn_conv.weight"]["exp_avg"].dtype == torch.uint8


def test_what_stops_training_is_fp32_again_and_holds_no_moments(tiny):
    config = settings(tiny, memory="int8_nomaster")
    rack = Rack(rack_spec(config, 2), seed=3)
    first = over(rack, config)
    steps(rack, first, 0, 2)
    before = {name: p.detach().clone() for name, p in rack.named_parameters()}
    second = over(rack, config, APPEND)
    for name, parameter in rack.named_parameters():
        narrow = parameter.requires_grad and parameter.numel() >= FEWEST
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), name
        assert torch.equal(parameter.float(), before[name].float()), name
    second.load(carried(first.state(), "carry", {}))
    assert second.state().keys() == {n for n, p in rack.named_parameters() if p.requires_grad}


def test_stacks_frozen_to_bf16_are_left_in_it(tiny):
    config = settings(tiny, memory="int8_nomaster")
    rack = Rack(rack_spec(config, 2), seed=3)
    over(rack, config)
    rack.stacks[0].weight_format = "bf16"
    over(rack, config, APPEND)
    assert dict(rack.named_parameters())["stacks.s0.blocks.0.attn.q.weight"].dtype == torch.bfloat16


# --- what it does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "Muon"])
def test_fused_is_int8_nomaster_bit_for_bit(tiny, kind):
    results = []
    for memory in ("int8_nomaster", "fused"):
        rack, optimizers = make(tiny, memory=memory, optimizer_type=kind, lr=0.01)
        norms = steps(rack, optimizers, 0, 4)
        assert all(p.grad is None for p in rack.parameters())
        results.append((rack.state_dict(), flat(optimizers), norms))
    (a, held, norms), (b, held_fused, norms_fused) = results
    assert same(a, b)
    assert same(held, held_fused)
    assert norms_fused == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("memory", MODES)
def test_decay_is_part_of_the_gradient_under_adam_and_beside_it_under_adamw(tiny, memory):
    """Without a gradient AdamW shrinks a weight by lr x decay; Adam takes a step of about lr towards zero."""
    name = "stacks.s0.blocks.0.ffn.up.weight"
    for kind in ("AdamW", "Adam"):
        rack, optimizers = make(tiny, optimizer_type=kind, memory=memory, lr=0.01, weight_decay=0.5)
        weight = dict(rack.named_parameters())[name]
        before = weight.detach().float().clone()
        weight.grad = torch.zeros_like(weight)
        optimizers.step()
        moved = (weight.detach().float() - before).abs().sum()
        expected = 0.005 * before.abs().sum() if kind == "AdamW" else 0.01 * weight.numel()
        assert float(moved / expected) == pytest.approx(1.0, abs=0.1), kind


def test_bits_of_weights_without_a_master_depend_on_the_seed_and_the_step(tiny):
    def weights(seed: int, first: int) -> Tensor:
        rack, optimizers = make(tiny, memory="int8_nomaster", training__seed=seed)
        weight = dict(rack.named_parameters())["head.weight"]
        weight.grad = torch.ones_like(weight)
        optimizers.set_factor(1.0, first)
        optimizers.step()
        return weight.detach().clone()

    assert torch.equal(weights(1, 5), weights(1, 5))
    assert not torch.equal(weights(1, 5), weights(2, 5))
    assert not torch.equal(weights(1, 5), weights(1, 6))


def test_adapters_are_trained_in_fp32_by_adamw(tiny):
    large = torch.nn.Parameter(torch.zeros(80, 80))
    name = "stacks.s0.blocks.0.attn.q.lora_A.stack.weight"
    config = settings(tiny, memory="int8_nomaster", optimizer_type="Muon")
    rule = rule_for(name, large, Stage("s", 2, ALL, 10), "s1", config.training)
    assert (rule.optimizer, rule.memory) == ("AdamW", "full")
    plain = rule_for(name.replace("lora_A.stack.", ""), large, Stage("s", 2, ALL, 10), "s1", config.training)
    assert (plain.optimizer, plain.memory) == ("Muon", "int8_nomaster")


def test_fused_keeps_no_gradient_while_the_backward_pass_goes_on(tiny):
    rack, optimizers = make(tiny, memory="fused")
    alive = []

    def watch(parameter: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in rack.parameters()))

    for parameter in rack.parameters():
        parameter.register_post_accumulate_grad_hook(watch)
    steps(rack, optimizers, 0, 1)
    assert len(alive) == len(list(rack.parameters()))
    assert max(alive) == 1


def test_fused_leaves_a_tensor_alone_whose_gradient_is_not_finite(tiny):
    rack, optimizers = make(tiny, memory="fused")
    name = "stacks.s1.blocks.0.attn.q.weight"
    weight = dict(rack.named_parameters())[name]
    weight.register_hook(lambda grad: grad * float("nan"))
    before = {n: p.detach().clone() for n, p in rack.named_parameters()}
    norms = steps(rack, optimizers, 0, 1)
    assert not norms[0] < float("inf")
    changed = {n for n, p in rack.named_parameters() if not torch.equal(p, before[n])}
    assert changed == before.keys() - {name}


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
@pytest.mark.parametrize("memory", MODES)
def test_moments_on_the_host_change_no_bit(tiny, monkeypatch, kind, memory):
    """On a CPU main memory is the device's own, so each journey is made a copy that must be brought back."""
    away: set[int] = set()
    ever: set[int] = set()
    most = []

    def move(value: Tensor, device: torch.device) -> Tensor:
        copy = value.clone()
        away.add(copy.data_ptr())
        ever.add(copy.data_ptr())
        return copy

    keep = optim_state.HostMoments.keep

    def kept(self, parameter: Tensor, name: str, value: Tensor) -> Tensor:
        most.append(len(away))
        away.discard(value.data_ptr())
        return keep(self, parameter, name, value)

    monkeypatch.setattr(optim_state, "move", move)
    monkeypatch.setattr(optim_state.HostMoments, "keep", kept)
    results = []
    for place in ("device", "host"):
        rack, optimizers = make(tiny, memory=memory, optimizer_type=kind, state_device=place)
        steps(rack, optimizers, 0, 3)
        results.append((rack.state_dict(), flat(optimizers), optimizers))
    (a, held, _), (b, held_host, optimizers) = results
    assert same(a, b)
    assert same(held, held_host)
    tensors = sum(t.nbytes for t in held.values() if t.dim())
    assert optimizers.host_bytes() == tensors
    assert optimizers.state_bytes() == sum(t.nbytes for t in held.values())
    assert max(most) <= 4, "codes and scales of two moments: those of one parameter at a time"
    assert ever
    assert not away
    assert not {t.data_ptr() for t in held_host.values() if t.dim()} & ever, "copies do not stay"


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("memory", MODES)
def test_stopped_and_continued_is_the_same_run(tiny, memory, place):
    """State goes through names, weights through a rack of fp32, as in a checkpoint."""
    changes = {"memory": memory, "state_device": place}
    config = settings(tiny, **changes)
    straight, optimizers = make(tiny, **changes)
    steps(straight, optimizers, 0, 6)
    stopped, first = make(tiny, **changes)
    steps(stopped, first, 0, 3)
    weights = {k: v.clone() for k, v in stopped.state_dict().items()}
    moments = {n: {k: v.clone() for k, v in held.items()} for n, held in first.state().items()}
    resumed = Rack(rack_spec(config, 2), seed=9)
    resumed.load_state_dict(weights)
    second = over(resumed, config)
    second.load(moments)
    steps(resumed, second, 3, 6)
    assert same(resumed.state_dict(), straight.state_dict())
    assert same(flat(second), flat(optimizers))


def test_copied_moments_are_shared_with_nobody(tiny):
    """Duplication: one old block may be the source of several new ones."""
    rack, optimizers = make(tiny, memory="int8")
    steps(rack, optimizers, 0, 1)
    old = "stacks.s0.blocks.0."
    copies = {"stacks.s1.blocks.0.": old, "tail.0.": old}
    state = carried({n: h for n, h in optimizers.state().items() if n.startswith(old)}, "copy", copies)
    _, fresh = make(tiny, memory="int8")
    fresh.load(state)
    held = fresh.state()
    assert held.keys() == {n for n, _ in rack.named_parameters() if n.startswith((old, *copies))}
    pointers = [t.data_ptr() for h in held.values() for t in h.values()]
    assert len(set(pointers)) == len(pointers)
    assert torch.equal(held["tail.0.ffn.up.weight"]["exp_avg"], state[old + "ffn.up.weight"]["exp_avg"])


def test_a_rack_of_mixed_widths_gives_the_logits_of_its_fp32_twin(tiny):
    rack, optimizers = make(tiny, memory="int8_nomaster", model__n_heads=4)
    steps(rack, optimizers, 0, 2)
    twin = Rack(rack.spec)
    twin.load_state_dict(rack.state_dict())
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    rack.eval()
    twin.eval()
    ids = batch(9)
    with torch.no_grad():
        torch.testing.assert_close(rack(ids), twin(ids), atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 6, "temperature": 0.0}
    assert torch.equal(rack.generate(ids, **options), twin.generate(ids, **options))
