"""Streamed racks compute what resident ones do, to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stackwise.inference.generate import generate
from stackwise.inference.plan import uncovered
from stackwise.model.names import set_modules
from stackwise.model.rack import recompute_block
from stackwise.model.spec import AdapterSpec
from stackwise.precision.convert import freeze_stack
from stackwise.trunk import streaming
from stackwise.trunk.gradients import HostGradients
from stackwise.trunk.lanes import Lane, host_like
from stackwise.trunk.ledger import Ledger
from stackwise.trunk.parking import park
from stackwise.trunk.residency import reside
from stackwise.trunk.streaming import Streamer

TRAINS = {
    "end to end": ("all",),
    "append": ("new", "tail", "norm", "head"),
    "prepend": ("stack:0",),
    "cyclic": ("stack:1",),
    "embedding": ("embedding", "norm", "head"),
}
STREAMED = {"frozen": "streamed", "trained": "streamed"}


def streamed(rack, device, **options: Any):
    """A streamed copy of a rack."""
    twin = copy.deepcopy(rack)
    reside(twin, device, **(options or STREAMED))
    return twin


@pytest.mark.parametrize("where", [{"frozen": "streamed"}, {"trained": "streamed"}, STREAMED], ids=str)
@pytest.mark.parametrize("trains", TRAINS)
def test_hidden_states_and_gradients_are_those_of_the_resident_rack(lab, trains, where):
    rack = lab.rack(4, blocks=2, dropout=0.1)
    prefix = lab.train(rack, *TRAINS[trains]).prefix
    twin = streamed(rack, lab.cpu, **where)
    for seed in (1, 2):  # the second adds to the gradients of the first
        ids = lab.ids(seed=seed)
        assert torch.equal(lab.both_ways(rack, prefix, ids), lab.both_ways(twin, prefix, ids))
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))


MODELS: dict[str, dict[str, Any]] = {
    "post-norm": {"norm_placement": "post", "norm": "layernorm", "bias": True},
    "grouped heads": {"n_kv_heads": 1, "qk_norm": True},
    "plain feed-forward": {
        "ffn_type": "gelu",
        "positions": None,
        "pos_encoding": "learned",
        "use_rope": False,
    },
    "convolutions, frozen up projection": {"short_conv": 3, "freeze_up_proj": True},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_every_kind_of_block_can_be_streamed(lab, model, half):
    options = {key: value for key, value in MODELS[model].items() if value is not None}
    rack = lab.rack(3, **options)
    lab.train(rack, "stack:1", "head")
    twin = streamed(rack, lab.cpu)
    document_ids = torch.tensor([[0] * 5 + [1] * 7] * 3)
    hidden = [lab.both_ways(each, document_ids=document_ids, half=half) for each in (rack, twin)]
    assert torch.equal(*hidden)
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))


@pytest.mark.parametrize("format", ["bf16", "nf4", "fp8"])
def test_frozen_formats_are_streamed_as_they_are_stored(lab, format):
    rack = lab.rack(3)
    for stack in list(rack.stacks)[1:]:
        freeze_stack(stack, format)
    lab.train(rack, "stack:0")
    twin = streamed(rack, lab.cpu)
    assert torch.equal(lab.both_ways(rack), lab.both_ways(twin))
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))
    assert twin.runner.ledger.most["buffers"] < 4 * sum(p.nbytes for p in rack.stacks[0].parameters())


def test_adapters_train_on_a_streamed_trunk(lab):
    pytest.importorskip("peft")
    from stackwise.adapters.attach import attach

    rack = lab.rack(3)
    for stack in rack.stacks:
        freeze_stack(stack, "nf4")
        attach(stack, AdapterSpec("trunk", rank=2, dropout=0.1))
    for name, parameter in rack.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    for stack in rack.stacks:
        for module in set_modules(stack, "trunk"):
            module.train()  # its dropout draws in a stack that draws nothing else
    twin = streamed(rack, lab.cpu, frozen="streamed")  # adapters alone do not make a stack a trained one
    assert all(block.parked for stack in twin.stacks for block in stack.blocks)
    assert torch.equal(lab.both_ways(rack), lab.both_ways(twin))
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))


def test_recomputed_and_streamed_blocks_mix(lab):
    rack = lab.rack(4)
    lab.train(rack, "stack:1", "stack:2", "head")
    twin = streamed(rack, lab.cpu, frozen="streamed", recompute=True)
    assert twin.runner.rest is recompute_block
    assert torch.equal(lab.both_ways(rack), lab.both_ways(twin))
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))


def test_gradients_of_two_passes_may_come_together(lab):
    rack = lab.rack(3)
    twin = streamed(rack, lab.cpu)
    for each in (rack, twin):
        a, b = (each.forward_features(lab.ids(seed=seed)) for seed in (1, 2))
        (a.square().mean() + (b * a).mean()).backward()
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))


def test_hooks_that_wait_for_a_gradient_run(lab):
    """Optimizers that step within the backward pass hang on them."""
    twin = streamed(lab.rack(2), lab.cpu)
    seen = []

    def use(parameter):
        seen.append(parameter)
        parameter.grad = None

    for parameter in twin.parameters():
        parameter.register_post_accumulate_grad_hook(use)
    lab.both_ways(twin)
    assert set(seen) == set(twin.parameters())
    assert len(seen) == len(set(seen))
    assert not lab.gradients(twin)


class LateLane(Lane):
    """Does each copy when somebody waits for it, or for a later one: as late as a stream may."""

    def __init__(self) -> None:
        self.queue: list[Any] = []

    def run(self, copy, *after):
        assert all(mark is None or mark is not copy for mark in after)
        self.queue.append((copy, after))
        return copy

    def mark(self):
        return None

    def wait(self, mark):
        while mark in [copy for copy, _ in self.queue]:
            copy, after = self.queue.pop(0)
            for other in after:
                if other is not None:
                    self.partner.wait(other)
            copy()

    settle = wait


@pytest.mark.parametrize("trains", TRAINS)
def test_copies_may_come_as_late_as_they_are_waited_for(lab, trains):
    rack = lab.rack(4)
    prefix = lab.train(rack, *TRAINS[trains]).prefix
    twin = streamed(rack, lab.cpu)
    up, down = LateLane(), LateLane()
    up.partner = down.partner = down
    twin.runner = Streamer(twin.blocks(), lab.cpu, lanes=(up, down))
    assert torch.equal(lab.both_ways(rack, prefix), lab.both_ways(twin, prefix))
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))


def test_gradients_share_no_memory_with_each_other_or_with_what_goes_on():
    """Scaling one of them in place, as clipping does, must scale that one alone."""
    a, b, c, d = (nn.Parameter(torch.zeros(2, 3)) for _ in range(4))
    shared, passed, both = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2, 3)

    class Send(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            sender.send([a, b, c, d], [shared, shared, passed, both[1]], [passed])
            return grad

    sender = HostGradients(Lane(), Ledger())
    Send.apply(torch.ones(1, requires_grad=True)).backward()
    memory = {p.grad.untyped_storage()._cdata for p in (a, b, c, d)}
    assert len(memory | {passed.untyped_storage()._cdata, both.untyped_storage()._cdata}) == 6
    assert all(torch.equal(p.grad, torch.ones(2, 3)) for p in (a, b, c, d))


def test_gradients_from_another_device_are_waited_for_and_added_on_the_host():
    events: list[str] = []

    class Watched(Lane):
        def run(self, copy, *after):
            events.append("copied")  # nothing can be copied out of the meta device
            return "arrived"

        def settle(self, mark):
            events.append(mark)

    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.register_post_accumulate_grad_hook(lambda p: events.append(f"on the {p.grad.device}"))
    ledger = Ledger()
    sender = HostGradients(Watched(), ledger)

    class Send(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            sender.send([parameter], [torch.ones(2, 3, device="meta")], [])
            assert ledger.live["gradients"] == 24
            return grad

    Send.apply(torch.ones(1, requires_grad=True)).backward()
    assert events == ["copied", "arrived", "on the cpu"]
    assert ledger.live["gradients"] == 0


class HostIsOnlyCopied(TorchDispatchMode):
    """Fails where an operation other than a copy reads memory of the host, as a device of its own would."""

    def __init__(self, tensors):
        super().__init__()
        self.host: dict[int, torch.Tensor] = {}
        self.copies = 0
        for tensor in tensors:
            self.watch(tensor)

    def watch(self, tensor):
        self.host[tensor.untyped_storage()._cdata] = tensor  # kept alive, or its address would come back
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        touched = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.untyped_storage()._cdata in self.host for t in touched):
            name = func.overloadpacket.__name__
            assert name in {"copy_", "detach", "empty_like"}, f"{name} on the host"
            self.copies += name == "copy_"
        return func(*args, **(kwargs or {}))


def test_the_computation_never_touches_the_host(lab, monkeypatch):
    rack = lab.rack(3)
    prefix = lab.train(rack, "stack:1", "norm", "head").prefix
    reside(rack, lab.cpu, **STREAMED)
    mode = HostIsOnlyCopied(p for block in rack.blocks() for p in block.parameters())

    monkeypatch.setattr(streaming, "host_like", lambda *given: mode.watch(host_like(*given)))
    with mode:
        lab.both_ways(rack, prefix)
    per_block = len(list(rack.blocks()[0].parameters()))
    assert (
        mode.copies == 4 * per_block + per_block + 2 * 3
    )  # all forward, one again backward; three boundaries
    parked = {n for n, _ in rack.named_parameters() if n.startswith("stacks.s1.")}
    assert {n for n in lab.gradients(rack) if n.startswith("stacks.")} == parked


def test_each_block_is_copied_once_per_pass_into_one_of_two_buffers(lab, monkeypatch):
    rack = lab.rack(5, tail=0)
    reside(rack, lab.cpu, **STREAMED)
    copies = []
    slots = rack.runner.slots
    start = slots.start

    def watch(block):
        copies.append(rack.blocks().index(block))
        return start(block)

    monkeypatch.setattr(slots, "start", watch)
    with torch.no_grad():
        rack(lab.ids())
    assert copies == [0, 1, 2, 3, 4]
    copies.clear()
    lab.both_ways(rack)
    assert copies == [0, 1, 2, 3, 4, 2, 1, 0]  # the last two are still there when gradients come back
    assert len({slot.buffer.data_ptr() for slot in slots._slots}) == 2


def test_changed_weights_are_seen_by_the_next_pass(lab):
    rack = streamed(lab.rack(3), lab.cpu)
    for _ in range(2):
        with torch.no_grad():
            before = rack(lab.ids())
            for block in rack.blocks():
                block.ffn.down.weight.mul_(0.5)
            after = rack(lab.ids())
        plain = copy.deepcopy(rack)
        reside(plain, lab.cpu)
        assert torch.equal(after, plain(lab.ids()))
        assert not torch.equal(after, before)


def test_generation_and_evaluation_are_those_of_the_resident_rack(lab):
    rack = lab.rack(3).eval()
    twin = streamed(rack, lab.cpu)
    assert "simply called" in (uncovered(twin) or "")
    prompts = lab.ids(2, 4)
    plain = copy.deepcopy(rack)
    plain.runner = lambda index, block, x, context, cache: block(
        x, context, cache
    )  # not through a plan either
    options = {"max_new_tokens": 9, "temperature": 0.0}
    assert torch.equal(generate(plain, prompts, **options), generate(twin, prompts, **options))
    with torch.inference_mode():
        assert torch.equal(rack(lab.ids()), twin(lab.ids()))
    assert torch.equal(lab.both_ways(rack), lab.both_ways(twin))  # the buffers serve training after all that


def test_a_cache_and_gradients_do_not_go_together(lab):
    rack = streamed(lab.rack(2), lab.cpu)
    with pytest.raises(ValueError, match=r"key-value cache and gradients.*use no_grad"):
        rack(lab.ids(), cache=rack.make_cache(3, 12))


def test_a_second_backward_pass_is_refused(lab):
    rack = streamed(lab.rack(2), lab.cpu)
    loss = rack(lab.ids()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"let go of their inputs.*compute the loss again"):
        loss.backward()


def test_a_block_that_changes_its_own_tensors_is_refused(lab):
    rack = lab.rack(2)

    class Counts(type(rack.stacks[0].blocks[0].ffn)):
        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x)

    ffn = rack.stacks[0].blocks[0].ffn
    ffn.register_buffer("calls", torch.zeros(1))
    ffn.__class__ = Counts
    reside(rack, lab.cpu, **STREAMED)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"changes its own tensors.*keep its stack resident"),
    ):
        rack(lab.ids())


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_pass_that_breaks_off_leaves_nothing_behind(lab, when):
    rack = lab.rack(4)
    twin = streamed(rack, lab.cpu)
    layer = twin.stacks[1].blocks[0].ffn.up
    calls = iter(range(10))

    def fail(module, inputs):
        if next(calls) == (0 if when == "forward" else 1):
            raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        lab.both_ways(twin)
    handle.remove()
    lab.both_ways(twin)
    twin.zero_grad()
    assert torch.equal(lab.both_ways(rack), lab.both_ways(twin))
    lab.assert_same(lab.gradients(rack), lab.gradients(twin))


def test_residency_is_one_of_those_there_are(lab):
    rack = lab.rack(2)
    with pytest.raises(ValueError, match="residency must be one of resident, streamed, mapped, got 'disk'"):
        reside(rack, lab.cpu, frozen="disk")
    with pytest.raises(ValueError, match="residency must be one of resident, streamed, got 'mapped'"):
        reside(rack, lab.cpu, trained="mapped")
    with pytest.raises(ValueError, match="need a folder"):
        reside(rack, lab.cpu, frozen="mapped")


def test_blocks_that_are_no_longer_parked_run_resident(lab):
    rack = lab.rack(2)
    plain = copy.deepcopy(rack)
    for block in rack.blocks():
        park(block)
    reside(rack, lab.cpu)
    assert not any(block.parked for block in rack.blocks())
    assert torch.equal(lab.both_ways(plain), lab.both_ways(rack))
    assert rack.runner is plain.runner
