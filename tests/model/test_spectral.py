"""Layers under spectral norm: their formula, how they follow training, and that nothing of them stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from stackwise import StackWiseConfig, create_rack_from_config
from stackwise.curriculum.builder import ProgressiveRackBuilder
from stackwise.curriculum.split import apply_training
from stackwise.model.block_spec import BlockSpec
from stackwise.model.linear import Linear
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec, RackSpec, StackSpec
from stackwise.model.spectral import SpectralLinear, add_spectral_norm
from stackwise.precision.convert import dense_tensors, freeze_stack
from stackwise.precision.fake_quant import fake_quantise
from stackwise.training.run import train
from stackwise.training.stored import open_run
from stackwise.trunk.residency import reside


def spec_of(spectral=True, **block):
    one = BlockSpec(32, 4, **block)
    stacks = tuple(StackSpec(f"s{i}", (one,), i, spectral=spectral) for i in range(2))
    return RackSpec(50, 32, stacks, max_seq_len=16)


def layers(module):
    return [m for m in module.modules() if isinstance(m, SpectralLinear)]


def norms(module):
    matrices = [
        p for n, p in module.named_parameters() if n.startswith(("stacks", "blocks")) and p.dim() == 2
    ]
    assert matrices
    return torch.stack([torch.linalg.matrix_norm(m.detach().double(), 2) for m in matrices])


def trained(rack, steps=40, lr=3e-3):
    ids = torch.randint(0, 50, (4, 12))
    optimizer = torch.optim.AdamW(rack.parameters(), lr)
    for _ in range(steps):
        F.cross_entropy(rack(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return rack


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (5, 3)])
def test_values_and_gradients_are_those_of_the_matrix_divided_by_its_largest_singular_value(shape):
    layer = SpectralLinear(Linear(*shape).double())
    layer.restart(torch.randn(layer.space.shape))
    layer.iterate(300)
    x = torch.randn(3, shape[0], dtype=torch.float64)
    weight = layer.weight.detach().clone().requires_grad_()
    expected = F.linear(x, weight / torch.linalg.svdvals(weight)[0], layer.bias.detach())
    torch.testing.assert_close(layer(x), expected, atol=1e-9, rtol=1e-9)
    grad = torch.randn_like(expected)
    layer(x).backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad, atol=1e-8, rtol=1e-7)


def test_the_largest_singular_value_stays_one_while_training_and_in_what_is_folded():
    rack = Rack(spec_of())
    assert (norms(rack) - 1).abs().max() > 0.1, "the matrices themselves have another norm"
    before = copy.deepcopy(rack).eval()
    before.fold_spectral_norm()
    assert (norms(before) - 1).abs().max() < 1e-2
    trained(rack)
    ids = torch.randint(0, 50, (3, 9))
    expected = rack.eval()(ids)
    rack.fold_spectral_norm()
    assert not layers(rack)
    assert rack.spec == spec_of(spectral=False)
    assert rack.state_dict().keys() == Rack(spec_of(spectral=False)).state_dict().keys()
    assert torch.equal(rack(ids), expected)
    assert (norms(rack) - 1).abs().max() < 1e-2


def test_one_vector_follows_when_another_singular_value_overtakes():
    left, right = (torch.linalg.qr(torch.randn(20, 20))[0] for _ in range(2))
    layer = SpectralLinear(Linear(20, 20, bias=False))

    def put(first, second):
        values = torch.tensor([first, second] + [0.5] * 18)
        layer.weight.data.copy_(left @ values.diag() @ right)

    put(1.0, 0.98)
    layer.restart(torch.randn(layer.space.shape))
    put(0.98, 1.2)
    layer.iterate()
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.normalised(), 2).detach(), torch.tensor(1.0))


@pytest.mark.parametrize("where", ["streamed", "recomputed"])
def test_streamed_and_recomputed_blocks_give_the_same_gradients(where):
    rack, ids = Rack(spec_of()), torch.randint(0, 50, (3, 9))
    twin = copy.deepcopy(rack)
    place = "streamed" if where == "streamed" else "resident"
    for each in (rack, twin):
        apply_training(each, {"stack:s0", "stack:s1", "head"})
    reside(twin, torch.device("cpu"), frozen=place, trained=place, recompute=where == "recomputed")
    for each in (rack, twin):
        each(ids).square().mean().backward()
    for (name, p), (_, q) in zip(rack.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_frozen_up_projections_keep_every_bit_and_stored_stacks_hold_the_folded_matrices():
    rack = trained(Rack(spec_of(freeze_up_proj=True)), steps=3)
    stack = rack.stacks[0]
    up = stack.blocks[0].ffn.up
    assert type(up) is Linear
    before, dense = up.weight.clone(), {n: t.clone() for n, t in dense_tensors(stack).items()}
    assert not any(name.endswith("space") for name in dense)
    fake_quantise(stack, "fp8")
    x = torch.randn(4, 32)
    rounded = stack.blocks[0].attn.q(x).detach()
    freeze_stack(stack, "fp8")
    assert torch.equal(before, dense["blocks.0.ffn.up.weight"])
    torch.testing.assert_close(stack.blocks[0].attn.q(x), rounded)
    error = (dense_tensors(stack)["blocks.0.attn.q.weight"] - dense["blocks.0.attn.q.weight"]).abs().max()
    assert error < 0.03
    assert not stack.spectral


def test_what_cannot_be_normalised_is_told():
    with pytest.raises(ValueError, match="cannot start as the identity"):
        Rack(spec_of(zero_init_outputs=True))
    from stackwise.adapters.attach import attach

    rack = Rack(spec_of(spectral=False))
    attach(rack.stacks[0], AdapterSpec("stack", rank=2))
    with pytest.raises(ValueError, match="has adapters"):
        add_spectral_norm(rack.stacks[0])


def config(**model):
    size = {"d_model": 32, "n_heads": 4, "vocab_size": 50, "max_seq_len": 16, "spectral_norm": True}
    return StackWiseConfig.from_dict({"model": {**size, **model}, "training": {"seq_len": 16}})


def test_racks_and_builders_honour_the_key():
    rack = create_rack_from_config(config())
    assert all(stack.spectral and layers(stack) for stack in rack.stacks)
    builder = ProgressiveRackBuilder(config(), building_mode="append")
    builder.append_stack()
    builder.append_stack()
    grown = trained(builder.build_rack(), steps=2, lr=5e-4)
    ids = torch.randint(0, 50, (3, 9))
    expected = grown.eval()(ids)
    builder.freeze_trunk()
    assert torch.equal(grown.eval()(ids), expected)
    assert [bool(layers(stack)) for stack in grown.stacks] == [False, True]
    assert [stack.spectral for stack in grown.spec.stacks] == [False, True]
    assert (norms(grown.stacks[0]) - 1).abs().max() < 1e-2


def test_a_run_folds_what_freezes_and_leaves_a_plain_model(tiny):
    result = train(tiny(model__spectral_norm=True, training__progressive__joint_tuning=False), sinks=[])
    run = open_run(result["run_dir"])
    assert not layers(run.rack)
    assert (norms(run.rack) - 1).abs().max() < 1e-2
    from stackwise.checkpoint.store import Store

    store = Store(run.folder.store)
    flags = [[s["spectral"] for s in store.meta(c)["rack"]["stacks"]] for c in store.commits()]
    assert [True] in flags
    assert [False, True] in flags
    assert flags[-1] == [False, False, False]
    hashes = {c.parts["stack:s0/weights"].sha256 for c in store.commits() if c.step > 5}
    assert len(hashes) == 1, "a frozen stack never changes"


@pytest.mark.parametrize("stop", [3, 7])
def test_a_resumed_run_ends_with_the_same_bytes(tiny, monkeypatch, stop):
    from stackwise.training.errors import Interrupted
    from stackwise.training.loop import Engine

    whole = train(tiny(model__spectral_norm=True, training__run_id="whole"), sinks=[])
    after = Engine._after_step

    def interrupted(self, stage):
        after(self, stage)
        if self.progress.step == stop:
            self._save(None)
            raise Interrupted(2, "test")

    part = tiny(model__spectral_norm=True, training__run_id="part")
    monkeypatch.setattr(Engine, "_after_step", interrupted)
    with pytest.raises(Interrupted):
        train(part, sinks=[])
    monkeypatch.setattr(Engine, "_after_step", after)
    resumed = train(part, sinks=[])
    first, second = (open_run(r["run_dir"]).rack.state_dict() for r in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_weights_from_before_rounding_are_put_back_folded(tiny):
    keys = {"training__progressive__trunk_precision": "nf4", "training__progressive__joint_tuning": False}
    run = open_run(train(tiny(model__spectral_norm=True, **keys), sinks=[])["run_dir"])
    run.restore_full_precision("s0")
    assert (norms(run.rack.stacks[0]) - 1).abs().max() < 1e-2
