"""Attention by kernels: random features against what they stand for, linear time against the sum itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from stackwise.model.attention.kernel import Kernel, kappa
from stackwise.model.attention.linear_time import linear_attention
from stackwise.model.attention.standalone import CoreAttention
from stackwise.model.attention_flops import CHUNK
from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import StateCache
from stackwise.model.factory import create_simple_rack
from stackwise.model.parts import KernelSpec, LatentSpec
from stackwise.model.visibility import Visibility

KERNELS = {
    "gaussian": KernelSpec("gaussian", bandwidth=1.5),
    "laplacian": KernelSpec("laplacian", bandwidth=2.0),
    "laplacian l1": KernelSpec("laplacian", bandwidth=3.0, norm="l1"),
    "uniform": KernelSpec("uniform", bandwidth=0.5),
}
WITH_MODES = {
    **KERNELS,
    "gaussian exact": KernelSpec("gaussian", "exact"),
    "laplacian exact": KernelSpec("laplacian", "exact"),
    "uniform exact": KernelSpec("uniform", "exact"),
    "gaussian linear": KernelSpec("gaussian", "linear", bandwidth=1.3),
    "softmax linear": KernelSpec("linear", "linear", 32),
}


LINEAR = WITH_MODES["gaussian linear"]


def kernel_of(spec, seed=0, **options):
    given = {"d_model": 24, "n_heads": 4, "causal": True, **options}
    kernel = Kernel(BlockSpec(kernel=spec, **given)).double()
    kernel.draw(torch.Generator().manual_seed(seed))
    return kernel


def by_formula(kind, norm, bandwidth, x, y):
    """The kernel of two vectors, from its definition."""
    apart = x - y
    if kind == "gaussian":
        return math.exp(-float(apart.square().sum()) / (2 * bandwidth**2))
    if kind == "laplacian":
        return math.exp(
            -float(apart.abs().sum() if norm == "l1" else apart.square().sum().sqrt()) / bandwidth
        )
    return math.prod(math.sin(d / bandwidth) / (d / bandwidth) for d in apart.tolist())


@pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS)
def test_the_exact_kernel_is_its_definition(spec):
    q, k = torch.randn(3, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    values = kappa(spec, q, k)
    expected = [[by_formula(spec.kind, spec.norm, spec.bandwidth, x, y) for y in k] for x in q]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS)
def test_random_features_come_near_the_kernel_as_their_root(spec):
    x = torch.randn(40, 6, dtype=torch.float64)
    exact = kappa(spec, x * 6**-0.25, x * 6**-0.25)
    errors = {}
    for count in (64, 4096):
        squares = []
        for seed in range(8):
            phi = kernel_of(KernelSpec(spec.kind, "score", count, spec.bandwidth, spec.norm), seed).phi(x)
            squares.append((phi @ phi.mT - exact).square().mean())
        errors[count] = float(torch.stack(squares).mean().sqrt())
        assert errors[count] < 5 / math.sqrt(count)
    assert 5 < errors[64] / errors[4096] < 13  # the root of 64 is 8


def seen_by(tokens, causal, padding=None, documents=None):
    seen = torch.ones(1, tokens, tokens, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if padding is not None:
        seen = seen & padding[:, None]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None])
    return seen


def weighted(weights, v, seen):
    """Rows of weights, brought to sum 1 over what is seen, times v; rows that see nothing give 0."""
    weights = weights * seen[:, None]
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)) @ v


def masks(tokens):
    padding = torch.ones(2, tokens, dtype=torch.bool)
    padding[0, :3] = padding[1, -2:] = False
    documents = torch.randint(0, 2, (2, tokens)).cumsum(-1) // 40
    return {"none": {}, "padding": {"padding": padding}, "documents": {"documents": documents}}


@pytest.mark.parametrize("mask", ["none", "padding", "documents"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["small", "large"])
def test_linear_time_is_the_weighted_mean_over_what_is_seen(mask, causal, scale):
    tokens = 2 * CHUNK + 70
    q, k = (scale * torch.randn(2, n, tokens, 5, dtype=torch.float64) for n in (4, 2))
    v = torch.randn(2, 2, tokens, 3, dtype=torch.float64)
    given = masks(tokens)[mask]
    visibility = Visibility(tokens, 0, given.get("padding"), given.get("documents"))
    out = linear_attention(q, k, v, visibility, causal, None)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = weighted(q.exp() @ k.exp().mT, v, seen_by(tokens, causal, **given))
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-10)


def test_gradients_of_linear_time_are_those_of_the_sum():
    tokens = CHUNK + 9
    leaves = [torch.randn(1, 2, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    q, k, v = leaves
    target = torch.randn(1, 2, tokens, 4, dtype=torch.float64)
    fast = torch.autograd.grad(
        (linear_attention(q, k, v, Visibility(tokens), True, None) * target).sum(), leaves
    )
    slow = weighted(q.exp() @ k.exp().mT, v, seen_by(tokens, True))
    for a, b in zip(fast, torch.autograd.grad((slow * target).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_features_too_large_or_small_for_a_number_do_no_harm():
    q, k = (torch.randn(1, 1, 300, 8) * 3 + shift for shift in (-5000.0, 3000.0))
    v = torch.randn(1, 1, 300, 2)
    out = linear_attention(q, k, v, Visibility(300), True, None)
    wide = [x.double() - x.double().amax() for x in (q, k)]
    expected = weighted(wide[0].exp() @ wide[1].exp().mT, v.double(), seen_by(300, True))
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "bandwidth"), [("gaussian", 1.3), ("linear", 1.0)])
def test_positive_features_have_the_kernel_as_their_mean(kind, bandwidth):
    spec = KernelSpec(kind, "linear", 100_000, bandwidth)
    kernel = kernel_of(spec)
    x = torch.nn.functional.normalize(
        torch.randn(5, 6, dtype=torch.float64), dim=-1
    )  # long ones vary too much
    psi = kernel.log_features(x).exp()
    products = psi[:, None] * psi
    error = products.std(-1) / math.sqrt(spec.features)
    y = x * 6**-0.25
    exact = (
        kappa(KernelSpec("gaussian", bandwidth=bandwidth), y, y) if kind == "gaussian" else (y @ y.mT).exp()
    )
    assert (error < 0.02 * exact).all()
    assert ((products.mean(-1) - exact).abs() < 6 * error).all()


@pytest.mark.parametrize("mask", ["none", "padding", "documents"])
@pytest.mark.parametrize(
    "spec", [s for s in WITH_MODES.values() if s.mode != "linear"], ids=lambda s: f"{s.kind}-{s.mode}"
)
def test_scores_are_softmax_of_the_kernel_times_beta(spec, mask):
    kernel = kernel_of(spec, n_kv_heads=2)
    torch.nn.init.uniform_(kernel.beta, 0.2, 2.0)
    q, k, v = (torch.randn(2, n, 11, 6, dtype=torch.float64) for n in (4, 2, 2))
    given = masks(11)[mask]
    out = kernel(q, k, v, Visibility(11, 0, given.get("padding"), given.get("documents")), None, 0.0)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    if spec.mode == "exact":
        gram = kappa(spec, q * 6**-0.25, k * 6**-0.25)
    else:
        phi = [math.sqrt(2 / 64) * (6**-0.25 * x @ kernel.features.mT + kernel.phases).cos() for x in (q, k)]
        gram = phi[0] @ phi[1].mT
    weights = (8.0 * kernel.beta[:, None, None] * gram).exp()
    torch.testing.assert_close(out, weighted(weights, v, seen_by(11, True, **given)))


def rack_of(spec, preset="kernel_attention", **options):
    given = {"max_seq_len": 256, "causal": True, **options}
    return create_simple_rack(1, 2, 24, 32, 4, 30, attention_preset=preset, kernel=spec, **given).eval()


@pytest.mark.parametrize("preset", ["kernel_attention", "mlgka"])
@pytest.mark.parametrize("spec", WITH_MODES.values(), ids=WITH_MODES)
def test_decoding_from_the_cache_is_the_full_pass_and_nothing_leaks(spec, preset):
    rack = rack_of(spec, preset).double()
    ids = torch.randint(0, 30, (2, 150))
    padding = torch.ones(2, 150, dtype=torch.long)
    padding[1, :4] = 0
    with torch.no_grad():
        full = rack(ids, padding)
        cache = rack.make_cache(2, 150)
        parts = [rack(ids[:, :140], padding[:, :140], cache=cache)]
        for start, stop in ((140, 141), (141, 145), (145, 150)):
            parts.append(rack(ids[:, start:stop], padding[:, :stop], cache=cache))
        changed = torch.cat((ids[:, :130], torch.randint(0, 30, (2, 20))), dim=1)
        before = rack(changed, padding)[:, :130]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-7, atol=1e-8)
    assert torch.equal(before, full[:, :130])


@pytest.mark.parametrize("spec", WITH_MODES.values(), ids=WITH_MODES)
def test_documents_and_padding_do_not_meet(spec):
    rack = rack_of(spec, causal=False).double()
    ids, others = torch.randint(0, 30, (2, 3, 12))
    documents = torch.tensor([0] * 5 + [1] * 7).expand(3, 12)
    with torch.no_grad():
        both = [
            rack(torch.cat((ids[:, :5], tail[:, 5:]), 1), document_ids=documents)[:, :5]
            for tail in (ids, others)
        ]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
        real = torch.ones(3, 12, dtype=torch.long)
        real[:, 5:] = 0
        both = [rack(torch.cat((ids[:, :5], tail[:, 5:]), 1), real)[:, :5] for tail in (ids, others)]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both[0], rack(ids[:, :5]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", WITH_MODES.values(), ids=WITH_MODES)
def test_they_train_under_autocast_and_come_near_full_precision(spec):
    rack, ids = rack_of(spec), torch.randint(0, 30, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(rack(ids).float().flatten(0, 1), ids.flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rack.parameters())
    full = F.cross_entropy(rack(ids).flatten(0, 1), ids.flatten())
    assert abs(loss - full) < 0.05 * full


def test_a_state_cache_has_the_same_size_at_any_length():
    rack = rack_of(KernelSpec("gaussian", "linear", 16))
    small, large = rack.make_cache(2, 10), rack.make_cache(2, 250)
    for cache in (small, large):
        assert all(isinstance(held, StateCache) for held in cache.blocks)
    assert [a.sums.shape for a in small.blocks] == [b.sums.shape for b in large.blocks] == [(2, 4, 16, 7)] * 2


def test_features_come_from_the_seed_and_the_place_and_are_saved():
    spec = KERNELS["laplacian"]
    first, same, other = rack_of(spec), rack_of(spec), rack_of(spec, seed=1)
    drawn = [
        {n: b for n, b in rack.state_dict().items() if n.endswith((".features", ".phases"))}
        for rack in (first, same, other)
    ]
    assert len(drawn[0]) == 4
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    assert not torch.equal(*(drawn[0][f"stacks.s0.blocks.{i}.attn.kernel.features"] for i in (0, 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KernelSpec("gausian"), "did you mean 'gaussian'"),
        (lambda: KernelSpec("gaussian", "fast"), "kernel_mode must be one of"),
        (lambda: KernelSpec("gaussian", features=0), "kernel_dim must be at least 1"),
        (lambda: KernelSpec("gaussian", bandwidth=0.0), "kernel_bandwidth"),
        (lambda: KernelSpec("laplacian", "linear"), "no positive features"),
        (lambda: KernelSpec("uniform", "linear"), "no positive features"),
        (lambda: KernelSpec("linear"), "plain attention"),
        (lambda: KernelSpec("gaussian", norm="l1"), "that of the laplacian kernel"),
        (lambda: kernel_of(LINEAR, window=4), "window changes single scores"),
        (lambda: kernel_of(LINEAR, alibi=True, rope_theta=None), "alibi changes single scores"),
        (lambda: kernel_of(LINEAR, softcap=4.0), "softcap changes single scores"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("preset", ["kernel_attention", "mlgka", "mla_attention"])
@pytest.mark.parametrize(
    "sight", [{"window": 5, "sinks": 2}, {"alibi": True, "rope_theta": None, "softcap": 3.0}], ids=str
)
@pytest.mark.parametrize("mode", ["score", "exact"])
def test_windows_distances_and_caps_hold_in_the_cache_as_in_the_full_pass(mode, sight, preset):
    options = dict(sight)
    if "alibi" in sight and preset != "kernel_attention":
        options["latent"] = LatentSpec(6, 3, 0)
    spec = None if preset == "mla_attention" else KernelSpec("gaussian", mode, 16)
    rack = rack_of(spec, preset, **options).double()
    ids = torch.randint(0, 30, (2, 40))
    with torch.no_grad():
        full = rack(ids)
        cache = rack.make_cache(2, 40)
        parts = [
            rack(ids[:, start:stop], cache=cache) for start, stop in ((0, 20), (20, 24), (24, 25), (25, 40))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-7, atol=1e-8)
    plain = rack_of(
        spec, preset, **{k: v for k, v in options.items() if k not in ("window", "sinks", "softcap")}
    )
    plain.double().load_state_dict(rack.state_dict())
    assert not torch.allclose(plain(ids), full)


@pytest.mark.parametrize("preset", ["gpt_style", "mla_attention", "kernel_attention", "mlgka"])
def test_attention_by_itself_is_made_again_from_its_config(preset):
    made = CoreAttention.from_config({"d_model": 16, "n_heads": 4, "attention_preset": preset, "seed": 5})
    again = CoreAttention.from_config(made.get_config())
    assert again.get_config() == made.get_config()
    assert [n for n, _ in again.named_buffers()] == [n for n, _ in made.named_buffers()]
    x = torch.randn(2, 9, 16)
    assert torch.equal(made(x), again(x))
    other = CoreAttention.from_config({**made.get_config(), "seed": 6})
    assert not torch.equal(made(x), other(x))
    assert made.get_attention_info()["n_kv_heads"] == (1 if preset == "mlgka" else 4)


def test_the_linear_kernel_is_plain_attention_without_buffers():
    made = CoreAttention.from_config(
        {"d_model": 16, "n_heads": 4, "kernel_type": "linear", "pos_encoding": "none"}
    )
    assert not list(made.buffers())
    x = torch.randn(2, 9, 16)
    q, k, v = (
        layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (made.attn.q, made.attn.k, made.attn.v)
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(made(x), made.attn.o(out), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kernel_dim": 0}, ValueError, "kernel_dim"),
        ({"n_kv_heads": 24}, ValueError, "n_kv_heads must divide"),
        ({"dropout": 1.2}, ValueError, "dropout"),
        ({"kernel_type": "laplacian", "kernel_mode": "linear"}, ValueError, "no positive features"),
        ({"attention_type": "mla", "mla_rope_dim": 3}, ValueError, "even"),
        ({"attention_typ": "mla"}, TypeError, "did you mean 'attention_type'"),
    ],
)
def test_wrong_fields_of_attention_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        CoreAttention.from_config(fields)


def test_attention_by_itself_refuses_rows_beyond_its_positions():
    made = CoreAttention.from_config({"d_model": 16, "n_heads": 4, "max_seq_len": 8})
    with pytest.raises(ValueError, match="9 tokens are more than max_seq_len = 8"):
        made(torch.randn(1, 9, 16))
