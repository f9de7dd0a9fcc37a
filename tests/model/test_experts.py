"""Mixtures of experts: the formula in float64, what balances them, and that they are parts like any other."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from stackwise.inference.plan import uncovered
from stackwise.model.block_spec import BlockSpec
from stackwise.model.experts import Experts, can_group
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import recompute_block, run_block
from stackwise.model.router import routed
from stackwise.model.spec import RackSpec

D, WIDTH = 12, 20


def make_rack(n_stacks=2, dtype=torch.float64, recompute=False, tokens=31, **experts):
    options = {"n_experts": 4, "top_k": 2, "width": WIDTH, **experts}
    rack = create_simple_rack(n_stacks, 1, D, 24, 2, tokens, experts=options, attention_preset="gpt_style")
    rack.runner = recompute_block if recompute else run_block
    return rack.to(dtype).train()


def make_layer(**experts):
    return make_rack(1, **experts).blocks()[0].ffn


def make_context(rack, ids, mask=None):
    return rack.make_context(ids, mask)


def expert_of(ffn, x):
    return ffn.down(F.silu(ffn.gate(x)) * ffn.up(x))


def reference(layer: Experts, x_BTD):
    """Token by token, expert by expert, as the formula says it."""
    spec, out = layer.router.spec, torch.zeros_like(x_BTD)
    for b, t in torch.cartesian_prod(torch.arange(x_BTD.shape[0]), torch.arange(x_BTD.shape[1])).tolist():
        x = x_BTD[b, t]
        logits = layer.router.weight @ x
        scores = logits.softmax(0) if spec.router == "softmax" else 1 / (1 + torch.exp(-logits))
        ranked = scores if layer.router.selection_bias is None else scores + layer.router.selection_bias
        per_group = spec.n_experts // spec.groups
        groups = [ranked[g * per_group : (g + 1) * per_group] for g in range(spec.groups)]
        n_best = 1 if spec.router == "softmax" else min(2, per_group)
        worth = [group.sort(descending=True).values[:n_best].sum().item() for group in groups]
        kept = sorted(range(spec.groups), key=lambda g: -worth[g])[: spec.top_groups]
        allowed = [i for i in range(spec.n_experts) if i // per_group in kept]
        chosen = sorted(allowed, key=lambda i: -ranked[i].item())[: spec.top_k]
        total = sum(scores[i] for i in chosen) if spec.normalise else 1.0
        for i in chosen:
            out[b, t] += spec.scale * scores[i] / total * expert_of(layer.experts[i], x)
    return out if layer.shared is None else out + expert_of(layer.shared, x_BTD)


KINDS = {
    "mixtral": {},
    "all": {"top_k": 4},
    "one": {"top_k": 1, "normalise": False},
    "switch off": {"n_experts": 1, "top_k": 1},
    "deepseek-v2": {
        "n_experts": 6,
        "groups": 3,
        "top_groups": 2,
        "normalise": False,
        "scale": 16.0,
        "n_shared": 2,
    },
    "deepseek-v3": {
        "n_experts": 8,
        "top_k": 3,
        "router": "sigmoid",
        "balancing": "bias",
        "groups": 4,
        "top_groups": 2,
        "scale": 2.5,
        "n_shared": 1,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_its_formula_with_all_gradients(kind):
    layer = make_layer(**KINDS[kind])
    if layer.router.selection_bias is not None:
        layer.router.selection_bias.uniform_(-0.3, 0.3)
    context = make_context(make_rack(), torch.zeros(2, 7, dtype=torch.int64))
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 7, D, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    mine, plain = layer(x, context), reference(layer, x)
    torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad((mine * weights).sum(), leaves)
    want = torch.autograd.grad((plain * weights).sum(), leaves, allow_unused=True)
    for mine_grad, plain_grad in zip(got, want, strict=True):
        plain_grad = torch.zeros_like(mine_grad) if plain_grad is None else plain_grad
        torch.testing.assert_close(mine_grad, plain_grad, rtol=1e-9, atol=1e-11)


def test_all_experts_are_the_dense_mixture():
    layer = make_layer(top_k=4)
    x = torch.randn(3, 5, D, dtype=torch.float64)
    shares = (x @ layer.router.weight.t()).softmax(-1)
    dense = sum(shares[..., i : i + 1] * expert_of(expert, x) for i, expert in enumerate(layer.experts))
    context = make_context(make_rack(), torch.zeros(3, 5, dtype=torch.int64))
    torch.testing.assert_close(layer(x, context), dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ffn_type", ["swiglu", "gelu"])
def test_grouped_products_compute_the_same(ffn_type):
    rack = create_simple_rack(1, 1, 16, 24, 2, 31, experts={"n_experts": 5, "top_k": 2}, ffn_type=ffn_type)
    layer = rack.blocks()[0].ffn.to(torch.bfloat16)
    assert can_group(layer.experts)
    x, counts = torch.randn(18, 16, dtype=torch.bfloat16, requires_grad=True), torch.tensor([3, 0, 9, 1, 5])
    leaves = [x, *layer.experts.parameters()]
    results = []
    for mixed in (layer._grouped(x, counts), layer._one_by_one(x, counts)):
        results.append([mixed, *torch.autograd.grad(mixed.float().square().sum(), leaves)])
    for grouped, single in zip(*results, strict=True):
        torch.testing.assert_close(grouped, single, rtol=0.05, atol=0.05)


def test_experts_with_biases_or_rounding_are_not_grouped():
    assert not can_group(
        create_simple_rack(1, 1, 16, 24, 2, 31, experts={"n_experts": 2}, bias=True).blocks()[0].ffn.experts
    )
    experts = create_simple_rack(1, 1, 16, 24, 2, 31, experts={"n_experts": 2}).blocks()[0].ffn.experts
    assert can_group(experts)
    experts[1].up.rounding = torch.clone
    assert not can_group(experts)


def step(rack, ids, mask=None, scale=1.0):
    """Gradients of the routers' losses alone, and the visits."""
    rack.zero_grad()
    with routed(rack, scale) as routing:
        hidden = rack.forward_features(ids, mask)
    (hidden * 0.0).sum().backward()
    gradients = {n: p.grad.clone() for n, p in rack.named_parameters() if p.grad is not None}
    return gradients, routing.visits


def test_counts_sum_to_k_times_the_real_tokens():
    rack, ids = make_rack(top_k=3), torch.randint(0, 31, (4, 9))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[2, 5:] = False
    _, visits = step(rack, ids, mask)
    assert len(visits) == 2
    for visit in visits:
        assert visit.counts.sum() == 3 * (4 * 9 - 4)


def losses_by_hand(rack, ids, mask, spec):
    """E sum f P of every row times its tokens, and the z-loss, from the definition; differentiable."""
    inputs = []
    hooks = [b.ffn.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for b in rack.blocks()]
    rack.forward_features(ids, mask)
    for hook in hooks:
        hook.remove()
    total = 0.0
    for block, x in zip(rack.blocks(), inputs, strict=True):
        logits = x @ block.ffn.router.weight.t()
        scores = logits.softmax(-1) if spec.router == "softmax" else logits.sigmoid()
        for b in range(len(ids)):
            rows = mask[b].nonzero().flatten()
            chosen = scores[b, rows].topk(spec.top_k).indices
            f = F.one_hot(chosen, spec.n_experts).double().sum((0, 1)) / (spec.top_k * len(rows))
            p = (scores[b, rows] / scores[b, rows].sum(-1, keepdim=True)).mean(0)
            z = torch.log(torch.exp(logits[b, rows]).sum(-1)).square()
            total = total + len(rows) * spec.aux_weight * spec.n_experts * (f * p).sum()
            total = total + spec.z_weight * z.sum()
    return total


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_losses_are_those_of_the_definition_and_reach_every_weight(router, recompute):
    rack = make_rack(recompute=recompute, router=router, aux_weight=0.3, z_weight=0.2)
    ids, mask = torch.randint(0, 31, (3, 8)), torch.ones(3, 8, dtype=torch.bool)
    mask[1, 6:] = False
    gradients, visits = step(rack, ids, mask, scale=0.5)
    rack.zero_grad()
    by_hand = losses_by_hand(rack, ids, mask, rack.spec.blocks[0].experts)
    (0.5 * by_hand).backward()
    assert sum(visit.loss for visit in visits).item() == pytest.approx(by_hand.item(), rel=1e-9)
    reached = {n: p.grad for n, p in rack.named_parameters() if p.grad is not None}
    assert any("router" in name for name in reached)
    assert "embedding.weight" in reached
    for name, gradient in gradients.items():
        expected = reached.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_an_even_load_costs_exactly_the_weight():
    rack = make_rack(1, n_experts=4, top_k=4, aux_weight=0.3)
    _, (visit,) = step(rack, torch.randint(0, 31, (2, 6)))
    assert visit.loss.item() == pytest.approx(0.3 * 12, rel=1e-12)  # f is even, so that P does not matter


def test_cutting_a_batch_changes_no_loss():
    rack, ids = make_rack(aux_weight=0.3, z_weight=0.1), torch.randint(0, 31, (4, 6))
    whole, visits = step(rack, ids)
    parts = [step(rack, part) for part in ids.split(1)]
    assert sum(v.loss for v in visits).item() == pytest.approx(
        sum(v.loss.item() for _, part in parts for v in part), rel=1e-12
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(part[name] for part, _ in parts), gradient, rtol=1e-9, atol=1e-13)


def test_frozen_stacks_and_evaluation_balance_nothing():
    rack, ids = make_rack(aux_weight=0.3), torch.randint(0, 31, (2, 6))
    rack.stacks[0].freeze_all()
    gradients, visits = step(rack, ids)
    assert [visit.router for visit in visits] == [rack.stacks[1].blocks[0].ffn.router]
    assert not any(name.startswith("stacks.s0") for name in gradients)
    rack.eval()
    assert step(rack, ids)[1] == []


def test_nobody_is_told_without_a_listener():
    rack, ids = make_rack(aux_weight=0.3), torch.randint(0, 31, (2, 6))
    (rack.forward_features(ids) * 0.0).sum().backward()
    assert not any(p.grad.any() for n, p in rack.named_parameters() if "router" in n)


def test_offsets_move_by_the_sign_and_choose_without_weighing():
    layer = make_layer(balancing="bias", bias_rate=0.25, router="sigmoid")
    layer.router.move_bias(torch.tensor([1.0, 5.0, 3.0, 3.0]))
    assert layer.router.selection_bias.tolist() == [0.25, -0.25, 0.0, 0.0]
    layer.router.selection_bias.copy_(torch.tensor([9.0, 0, 9, 0]))
    weights, chosen = layer.router(torch.randn(1, 5, D, dtype=torch.float64))
    assert set(chosen.flatten().tolist()) == {0, 2}
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 5, dtype=torch.float64))


def test_offsets_bring_an_uneven_load_to_an_even_one():
    torch.manual_seed(0)
    layer = make_layer(n_experts=8, balancing="bias", bias_rate=0.01, router="sigmoid")
    x = torch.randn(1, 400, D, dtype=torch.float64) + 1.0  # a common direction favours some experts

    def load():
        chosen = layer.router(x)[1].flatten()
        return torch.bincount(chosen, minlength=8).double()

    before = load().max() / load().mean()
    for _ in range(150):
        layer.router.move_bias(load())
    assert before > 1.5
    assert load().max() / load().mean() < 1.2


def test_the_router_computes_in_fp32_under_autocast():
    layer = make_layer().float()
    x = torch.randn(1, 6, D)
    exact = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = layer.router(x)
    assert torch.equal(exact[0], again[0])
    assert torch.equal(exact[1], again[1])


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    rack = make_rack(1, n_experts=4, top_k=1, balancing="bias")
    router = rack.blocks()[0].ffn.router
    router.selection_bias.copy_(torch.tensor([0.0, 0, 0, -99]))
    rack(torch.randint(0, 31, (1, 4))).sum().backward()
    unused = rack.blocks()[0].ffn.experts[3]
    assert all(p.grad is not None and not p.grad.any() for p in unused.parameters())
    with torch.no_grad():
        unused.down.register_forward_hook(lambda *_: pytest.fail("an expert without tokens ran"))
        rack(torch.randint(0, 31, (1, 4)))


def test_descriptions_survive_json():
    spec = make_rack(n_shared=1, router="sigmoid", balancing="bias").spec
    assert RackSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.blocks[0].experts.n_experts == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, "top_k must be from 1 to n_experts = 4, got 5"),
        ({"n_experts": 0}, "leave experts out"),
        ({"groups": 3}, "groups must divide n_experts"),
        ({"groups": 4}, "more than the 1 experts"),
        ({"router": "sofmax"}, "did you mean 'softmax'"),
        ({"balancing": "loss"}, "aux or bias"),
        ({"z_weight": -1.0}, "z_weight must not be negative"),
        ({"scale": 0.0}, "above 0"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockSpec.create({"d_model": 16, "n_heads": 2, "experts": {"n_experts": 4, "top_k": 2, **fields}})


def test_decoding_goes_through_the_modules_and_equals_the_whole_pass():
    rack = make_rack(n_shared=1).eval()
    assert "Experts" in uncovered(rack.float())
    rack.double()
    ids = torch.randint(0, 31, (2, 9))
    cache = rack.make_cache(2, 9)
    with torch.no_grad():
        steps = torch.cat([rack(ids[:, t : t + 1], cache=cache) for t in range(9)], dim=1)
        torch.testing.assert_close(steps, rack(ids), rtol=1e-9, atol=1e-11)


def test_a_frozen_up_projection_stays_frozen_in_every_expert():
    rack = create_simple_rack(
        1, 1, D, 24, 2, 31, freeze_up_proj=True, experts={"n_experts": 3, "n_shared": 1}
    )
    ups = [p for n, p in rack.named_parameters() if ".up." in n]
    assert len(ups) == 4
    assert not any(p.requires_grad for p in ups)
    rack.stacks[0].freeze_all()
    rack.stacks[0].unfreeze_all()
    assert not any(p.requires_grad for p in ups)
    assert all(p.requires_grad for n, p in rack.named_parameters() if ".down." in n or "router" in n)


def test_copies_route_alike():
    rack, ids = make_rack(balancing="bias").eval(), torch.randint(0, 31, (2, 6))
    rack.stacks[0].blocks[0].ffn.router.selection_bias.uniform_(-0.2, 0.2)
    assert torch.equal(copy.deepcopy(rack)(ids), rack(ids))
