"""Depth diagnostics: by hand, independent of how rows are batched, and leaving the rack as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import EvalLoader
from stackwise.evaluation.depth import Depth, depth
from stackwise.evaluation.routes import Route, routes_of, whole_route
from stackwise.model.factory import create_simple_rack
from stackwise.model.own_io import InOut
from stackwise.model.rack import Rack, run_block
from stackwise.objectives.base import Example
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.head import context_of, hidden_of
from stackwise.objectives.masked import MaskedLM, Vocabulary
from stackwise.precision.convert import freeze_stack
from stackwise.training.validate import validate

V, MASK, N, T = 17, 16, 340, 16
MODEL = Vocabulary(V, MASK)
MASKED = {
    "clm": CausalLM(),
    "mlm": MaskedLM(MODEL, seed=5, corruption="bert"),
    "diffusion": Diffusion(MODEL, seed=5, corruption="absorbing"),
}


def rack_of(n_stacks: int = 3, blocks: int = 2, *, causal: bool = True, **options: Any) -> Rack:
    preset = "gpt_style" if causal else "bert_style"
    options = {"attention_preset": preset, "max_seq_len": 32, **options}
    rack = create_simple_rack(n_stacks, blocks, 16, 24, 2, V, **options)
    with torch.no_grad():
        rack.head.matrix.mul_(1.5)
        for p in rack.stacks.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return rack.eval()


@pytest.fixture
def split() -> TokenSplit:
    tokens = np.random.default_rng().integers(0, MASK, N)
    return TokenSplit.from_arrays(tokens, doc_starts=[0, 37, 40, 41, 200], n_bytes=1234, name="validation")


def reference_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of float64 states [n, D] (Kornblith et al. 2019)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.t() @ x).norm() ** 2 / ((x.t() @ x).norm() * (y.t() @ y).norm()))


def example_of(split: TokenSplit) -> Example:
    """All windows as one batch."""
    return CausalLM().corrupt(next(iter(EvalLoader(split, seq_len=T, batch_size=1000))))


def figures(result: Depth) -> list[float]:
    """All numbers of a result."""
    found: list[float] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif isinstance(value, float):
            found.append(value)

    walk(result.to_dict()["views"])
    return found


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_the_whole_is_the_held_out_loss_and_the_exit_after_the_last_stack_exactly(
    split: TokenSplit, kind: str
) -> None:
    rack, passes = rack_of(causal=kind == "clm"), 1 if kind == "clm" else 2
    result = depth(rack, MASKED[kind], split, seq_len=T, batch_size=4, passes=passes)
    total, count = validate(
        rack, EvalLoader(split, seq_len=T, batch_size=4), objective=MASKED[kind], passes=passes
    )
    (view,) = result.views
    assert (view.loss, view.weight) == (total / count, count)
    assert view.stacks[-1].exit == view.loss
    assert view.stacks[0].removed != 0


def test_the_tail_reads_with_the_head(split: TokenSplit) -> None:
    rack = rack_of(3, 1)
    short = Rack(replace(rack.spec, stacks=rack.spec.stacks[:2], tail=rack.spec.stacks[2].blocks))
    values = rack.state_dict()
    moved = {name.replace("stacks.s2.blocks.", "tail."): value for name, value in values.items()}
    short.load_state_dict(moved)
    (deep,), (view,) = (depth(r, CausalLM(), split, seq_len=T).views for r in (rack, short))
    assert view.loss == view.stacks[-1].exit == pytest.approx(deep.loss, rel=1e-6)
    assert view.stacks[0].exit == pytest.approx(deep.loss + deep.stacks[1].removed, rel=1e-6)


def test_without_an_identity_nothing_changes(split: TokenSplit) -> None:
    rack = rack_of()
    with torch.no_grad():
        for block in rack.stacks[1].blocks:
            for layer in block.output_projections():
                for p in layer.parameters():
                    p.zero_()
    (view,) = depth(rack, CausalLM(), split, seq_len=T).views
    first, identity, last = view.stacks
    assert (identity.removed, identity.update) == (0, 0)
    assert identity.exit == first.exit
    assert identity.stream == first.stream
    assert view.cka[1][2] == pytest.approx(1, abs=1e-12)
    assert last.removed != 0
    assert (last.update or 0) > 0.1


def test_each_loss_is_that_of_a_rack_without_the_stack(split: TokenSplit) -> None:
    rack, example = rack_of(), example_of(split)
    (view,) = depth(rack, CausalLM(), split, seq_len=T, batch_size=5).views
    stacks = list(rack.stacks)

    def loss(kept: list[int]) -> float:
        part = Rack(rack.spec.with_stacks([stacks[i].spec for i in kept]), stacks=[stacks[i] for i in kept])
        part.load_state_dict(rack.state_dict(), strict=False)
        with torch.no_grad():
            total, weight = CausalLM().loss(hidden_of(part, CausalLM(), example), part.head, example)
        return float(total / weight)

    for i, figure in enumerate(view.stacks):
        without = loss([j for j in range(3) if j != i])
        assert figure.removed == pytest.approx(without - view.loss, abs=1e-5)
        assert figure.exit == pytest.approx(loss(list(range(i + 1))), abs=1e-5)


# --- gradients, norms and similarity -------------------------------------------------------------------------------


def test_gradients_and_norms_are_those_by_hand(split: TokenSplit) -> None:
    rack, example = rack_of(), example_of(split)
    (view,) = depth(rack, CausalLM(), split, seq_len=T, batch_size=5).views
    rack = rack.double()
    context = context_of(rack, example)
    x = rack.embed(example.input_ids, context)
    states = [x]
    for i in range(3):
        states.append(rack.run(states[-1], context, 2 * i, 2 * i + 2))
    for state in states:
        state.retain_grad()
    total, weight = CausalLM().loss(rack.norm(states[-1]), rack.head, example)
    total.backward()
    tokens = example.input_ids.numel()
    assert view.entry_stream == pytest.approx(float(states[0].detach().square().mean().sqrt()), rel=1e-5)
    for i, figure in enumerate(view.stacks):
        before, after = states[i], states[i + 1]
        squares = sum(float(p.grad.square().sum()) for p in rack.stacks[i].parameters() if p.grad is not None)
        assert figure.gradient == pytest.approx(math.sqrt(squares) / float(weight), rel=1e-4)
        assert after.grad is not None
        signal = math.sqrt(float(after.grad.square().sum()) / tokens)
        assert figure.signal == pytest.approx(signal, rel=1e-4)
        assert figure.stream == pytest.approx(float(after.detach().square().mean().sqrt()), rel=1e-5)
        ratio = (after - before).norm(dim=-1) / before.norm(dim=-1)
        assert figure.update == pytest.approx(float(ratio.detach().mean()), rel=1e-5)
    flat = [state.detach().flatten(0, 1) for state in states]
    for i in range(4):
        for j in range(4):
            assert view.cka[i][j] == pytest.approx(reference_cka(flat[i], flat[j]), abs=1e-6)
            cosine = torch.cosine_similarity(flat[i], flat[j], dim=-1).mean()
            assert view.cosine[i][j] == pytest.approx(float(cosine), abs=1e-6)
    assert view.points == ("embedding", "s0", "s1", "s2")


def test_padding_is_no_token(split: TokenSplit) -> None:
    (view,) = depth(rack_of(), CausalLM(), split, seq_len=T, packing=False).views
    rows = list(EvalLoader(split, seq_len=T, batch_size=3, packing=False))
    assert any("attention_mask" in batch for batch in rows)
    present = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in rows]
    assert view.tokens == sum(int(mask.sum()) for mask in present)
    assert view.tokens < sum(batch["input_ids"].numel() for batch in rows)


@pytest.mark.parametrize("kind", sorted(MASKED))
@pytest.mark.parametrize("packing", [True, False])
def test_it_does_not_depend_on_the_batch_size(split: TokenSplit, kind: str, packing: bool) -> None:
    rack = rack_of(2, 1, causal=kind == "clm")
    first, *others = (
        depth(rack, MASKED[kind], split, seq_len=T, batch_size=size, windows=13, packing=packing)
        for size in (1, 4, 64)
    )
    assert first.windows == min(13, EvalLoader(split, seq_len=T, batch_size=1, packing=packing).rows)
    for other in others:
        # float32 losses of about 4 are known to 5e-7, and figures are differences of several
        assert figures(other) == pytest.approx(figures(first), abs=1e-5, rel=1e-5)


def test_the_same_call_gives_the_same_figures_and_leaves_the_rack_alone(split: TokenSplit) -> None:
    rack = rack_of(2, 1, dropout=0.3).train()
    rack.stacks[0].freeze_all()
    needed = [p.requires_grad for p in rack.parameters()]
    modes = [m.training for m in rack.modules()]
    calls: list[tuple[int, int]] = []
    first = depth(rack, CausalLM(), split, seq_len=T, progress=lambda *done: calls.append(done))
    assert first == depth(rack, CausalLM(), split, seq_len=T)
    assert calls == [(i, len(calls)) for i in range(1, len(calls) + 1)]
    assert [p.requires_grad for p in rack.parameters()] == needed
    assert [m.training for m in rack.modules()] == modes
    assert all(p.grad is None for p in rack.parameters())
    assert rack.runner is run_block
    assert first.views[0].stacks[0].gradient  # frozen, and yet it has one


# --- kinds of racks --------------------------------------------------------------------------------------------------


def test_a_packed_stack_has_no_gradient_of_its_own_but_passes_one_on(split: TokenSplit) -> None:
    rack = rack_of()
    freeze_stack(rack.stacks[0], "nf4")
    (view,) = depth(rack, CausalLM(), split, seq_len=T).views
    packed, plain = view.stacks[:2]
    assert (packed.format, packed.gradient) == ("nf4", None)
    assert packed.signal
    assert plain.gradient


@pytest.mark.parametrize(
    "options",
    [{"experts": {"n_experts": 4, "top_k": 2}}, {"window": 4}, {"norm_placement": "post"}],
    ids=str,
)
def test_experts_windows_and_other_norms(split: TokenSplit, options: dict[str, Any]) -> None:
    rack = rack_of(2, 1, **options)
    one, other = (depth(rack, CausalLM(), split, seq_len=T, batch_size=size) for size in (2, 7))
    assert figures(one) == pytest.approx(figures(other), abs=2e-6, rel=1e-5)
    assert all(stack.gradient for stack in one.views[0].stacks)


def test_stacks_that_run_alone_are_asked_in_each_others_place(split: TokenSplit) -> None:
    rack = rack_of(2, 1, causal=False)
    for stack in rack.stacks:
        stack.io = InOut(rack.spec)
        with torch.no_grad():
            for p in stack.io.parameters():
                p.normal_()
    objective = MASKED["diffusion"]
    route = Route("light", (0, 1), (0.0, 0.5), tail=False, alone=True, owner=1)
    (view,) = depth(rack, objective, split, seq_len=T, routes=[route]).views
    assert view.loss == view.stacks[1].exit
    assert view.stacks[0].exit != view.loss
    assert view.stacks[0].removed is view.stacks[0].gradient is view.stacks[0].signal is None
    assert view.stacks[1].gradient
    assert view.points == ("s0", "s1")

    total = weight = 0.0
    evaluation, place = objective.for_evaluation(), 0
    for batch in EvalLoader(split, seq_len=T, batch_size=8):
        places = torch.arange(place, place + len(batch["input_ids"]))
        place += len(places)
        keys = {"draws": torch.zeros_like(places), "places": places}
        example = evaluation.corrupt({**batch, **keys}, (0.0, 0.5))
        io = rack.io_of(0)
        with torch.no_grad():
            context = context_of(rack, example)
            x = rack.run(rack.embed(example.input_ids, context, io), context, 0, 1)
            loss, of = evaluation.loss(io.norm(x), io.head, example)
        total, weight = total + float(loss), weight + float(of)
    assert view.stacks[0].exit == pytest.approx(total / weight, rel=1e-6)


P = "training__progressive__"


@pytest.mark.parametrize(
    ("mode", "positions", "alone"),
    [("independent", [(0, 1, 2)] * 3, True), ("prepend", [(2,), (1, 2), (0, 1, 2)], False)],
)
def test_where_depth_is_time_every_owner_has_a_route(
    tiny: Callable[..., Any], mode: str, positions: list[tuple[int, ...]], alone: bool
) -> None:
    from stackwise.config.resolve import resolve

    changes = {P + "building_mode": mode, P + "training_objective": "diffusion", P + "joint_tuning": False}
    config, _ = resolve(tiny(**changes), vocab_size=V, mask_id=MASK)
    rack = rack_of(3, 1, causal=False)
    routes = routes_of(rack, config)
    assert [route.positions for route in routes] == positions
    assert [route.owner for route in routes] == [2, 1, 0]
    assert {route.alone for route in routes} == {alone}
    assert [route.noise for route in routes] == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    whole, _ = resolve(tiny(), vocab_size=V)
    assert routes_of(rack, whole) == [whole_route(rack)]


# --- wrong inputs --------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_named(split: TokenSplit) -> None:
    rack = rack_of(1, 1)
    with pytest.raises(ValueError, match="needs a causal rack"):
        depth(rack_of(1, 1, causal=False), CausalLM(), split, seq_len=T)
    with pytest.raises(ValueError, match="passes must be at least 1, got 0"):
        depth(rack, CausalLM(), split, seq_len=T, passes=0)
    with pytest.raises(ValueError, match="longer than the model's max_seq_len = 32"):
        depth(rack, CausalLM(), split, seq_len=33)
    with pytest.raises(ValueError, match="n_rows is 0"):
        depth(rack, CausalLM(), split, seq_len=T, windows=0)
    with pytest.raises(ValueError, match="outside a vocabulary of 17"):
        depth(rack, CausalLM(), TokenSplit.from_arrays([17] * 40), seq_len=T)
    special = TokenSplit.from_arrays([MASK] * 40)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        depth(rack_of(1, 1, causal=False), MASKED["mlm"], special, seq_len=T)


def test_a_result_is_json(split: TokenSplit) -> None:
    found = json.loads(json.dumps(depth(rack_of(), CausalLM(), split, seq_len=T).to_dict()))
    assert [stack["uid"] for stack in found["views"][0]["stacks"]] == ["s0", "s1", "s2"]
