"""Multi-head latent attention: its formula, its cache, and decoding that absorbs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from stackwise.kernels.rotary import rotate_reference
from stackwise.model.attention.mla import LatentAttention
from stackwise.model.block import Context
from stackwise.model.block_spec import BlockSpec
from stackwise.model.factory import create_simple_rack
from stackwise.model.init import Start, init_weights
from stackwise.model.parts import LatentSpec
from stackwise.model.spec import RackSpec
from stackwise.model.visibility import Visibility

LATENT = LatentSpec(q_rank=10, kv_rank=6, rope_dim=4, nope_dim=6, value_dim=5)


def block_of(latent=LATENT, **options):
    given = {"d_model": 24, "n_heads": 4, "causal": True, "attention_type": "mla", **options}
    return BlockSpec(latent=latent, **given)


def attention_of(spec, dtype=torch.float64):
    attention = LatentAttention(spec).to(dtype).eval()
    init_weights(attention, Start(3, 1), prefix="attn.")
    for name, parameter in attention.named_parameters():
        if parameter.dim() < 2:  # norms and biases that do something
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return attention


def context_of(tokens, past=0, limit=64, **more):
    return Context(Visibility(tokens, past, **more), None, limit)


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def by_hand(attention, x, spec):
    """The formula, head by head and token by token."""
    latent, groups = spec.latent, spec.n_heads // spec.n_kv_heads
    nope, value = latent.nope_dim or spec.head_dim, latent.value_dim or spec.head_dim
    weights = dict(attention.named_parameters())

    def layer(name, y):
        return y @ weights[f"{name}.weight"].mT + weights.get(f"{name}.bias", 0)

    q = (
        layer("q", x)
        if not latent.q_rank
        else layer("q_up", rms(layer("q_down", x), weights["q_norm.weight"]))
    )
    q = q.unflatten(-1, (spec.n_heads, -1))
    held = layer("kv_down", x)
    up = layer("kv_up", rms(held[..., : latent.kv_rank], weights["kv_norm.weight"]))
    up = up.unflatten(-1, (spec.n_kv_heads, -1))
    at = torch.arange(x.shape[1])
    q_r, k_r = q[..., nope:], held[..., None, latent.kv_rank :]
    if latent.rope_dim:
        q_r, k_r = (rotate_reference(part, at, spec.rope_theta) for part in (q_r, k_r))
    out = torch.zeros(*x.shape[:2], spec.n_heads, value, dtype=x.dtype)
    for n in range(spec.n_heads):
        k_c, v = up[:, :, n // groups, :nope], up[:, :, n // groups, nope:]
        scores = q[:, :, n, :nope] @ k_c.mT + q_r[:, :, n] @ k_r[:, :, 0].mT
        scores = latent.scale * scores / (nope + latent.rope_dim) ** 0.5
        if spec.causal:
            scores = scores.masked_fill(at[None, :, None] < at[None, None], -torch.inf)
        out[:, :, n] = scores.softmax(-1) @ v
    return layer("o", out.flatten(-2))


SHAPES = {
    "compressed": {},
    "plain queries": {"latent": replace(LATENT, q_rank=0)},
    "bidirectional": {"causal": False},
    "grouped": {"n_kv_heads": 2},
    "biases": {"bias": True},
    "no rotation": {"latent": replace(LATENT, rope_dim=0), "rope_theta": None},
    "wide values": {"latent": LatentSpec(0, 6, 2, nope_dim=4, value_dim=9, scale=1.7)},
    "defaults": {"latent": LatentSpec(6, 3, 2)},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_computes_its_formula(shape):
    spec = block_of(**shape)
    attention, x = attention_of(spec), torch.randn(2, 9, 24, dtype=torch.float64)
    out = attention(x, context_of(9))
    torch.testing.assert_close(out, by_hand(attention, x, spec), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s.get("causal", True)])
def test_absorbed_decoding_equals_the_plain_form(shape, new, monkeypatch):
    spec = block_of(**shape)
    attention, x = attention_of(spec), torch.randn(2, 32, 24, dtype=torch.float64)
    padding = torch.ones(2, 32, dtype=torch.bool)
    padding[1, :5] = False
    outs = {}
    for absorbs in (True, False):
        monkeypatch.setattr(LatentAttention, "absorbs", lambda *_, absorbs=absorbs: absorbs)
        cache = attention.make_cache(2, 32, torch.float64, torch.device("cpu"))
        for start, stop in ((0, 20), *((t, t + new) for t in range(20, 32, new))):
            context = context_of(stop - start, start, attention_mask=padding[:, :stop])
            out = attention(x[:, start:stop], context, cache)
        outs[absorbs] = out
    full = attention(x, context_of(32, attention_mask=padding))[:, -new:]
    torch.testing.assert_close(outs[True], full, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(outs[False], full, rtol=1e-9, atol=1e-10)


def test_a_token_over_a_long_past_absorbs_and_a_prompt_does_not(monkeypatch):
    attention = LatentAttention(block_of(LatentSpec(16, 12, 8, 16, 16), d_model=64))
    assert attention.absorbs(1, 500)
    assert not attention.absorbs(500, 500)
    built, plain = [], attention._keys_values
    monkeypatch.setattr(attention, "_keys_values", lambda held: built.append(held.shape[1]) or plain(held))
    cache = attention.make_cache(1, 70, torch.float32, torch.device("cpu"))
    x = torch.randn(1, 70, 64)
    attention(x[:, :64], context_of(64, limit=70), cache)
    attention(x[:, 64:65], context_of(1, 64, limit=70), cache)
    assert built == [64]
    handle = attention.kv_up.register_forward_hook(lambda *_: None)
    attention(x[:, 65:66], context_of(1, 65, limit=70), cache)
    assert built == [64, 66]  # a layer with a hook is called, for the hook may change what it gives
    handle.remove()
    attention(x[:, 66:67], context_of(1, 66, limit=70), cache)
    assert built == [64, 66]


def test_the_cache_holds_latent_and_rotary_key_of_each_token_and_no_more():
    rack = create_simple_rack(1, 2, 64, 96, 4, 30, attention_preset="mla_attention", causal=True)
    latent = rack.spec.blocks[0].latent
    assert (latent.q_rank, latent.kv_rank, latent.rope_dim) == (16, 8, 8)
    cache = rack.make_cache(3, 50)
    assert [held.held.numel() for held in cache.blocks] == [3 * 50 * (8 + 8)] * 2


@pytest.mark.parametrize("left_out", ["value", "key"])
def test_later_tokens_leave_no_trace(left_out):
    attention, x = attention_of(block_of()), torch.randn(1, 8, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:] = torch.randn(1, 3, 24, dtype=torch.float64) * (10 if left_out == "value" else 1)
    both = [attention(y, context_of(8))[:, :5] for y in (x, changed)]
    assert torch.equal(*both)


def test_scores_depend_on_distances_and_order_matters():
    rack = create_simple_rack(1, 2, 32, 48, 4, 30, attention_preset="mla_attention", max_seq_len=128).double()
    ids = torch.randint(0, 30, (2, 10))
    first, later = (rack(ids, position_ids=torch.arange(at, at + 10)[None]) for at in (0, 100))
    torch.testing.assert_close(first, later, rtol=1e-5, atol=1e-5)
    order = torch.randperm(10)
    while torch.equal(order, torch.arange(10)):
        order = torch.randperm(10)
    assert not torch.allclose(rack(ids[:, order])[:, order.argsort()], first, atol=1e-3)


def test_descriptions_survive_json():
    rack = create_simple_rack(1, 2, 32, 48, 4, 30, attention_preset="mla_attention")
    assert RackSpec.from_dict(json.loads(json.dumps(rack.spec.to_dict()))) == rack.spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentSpec(4, 4, 3), "even"),
        (lambda: LatentSpec(4, 0, 2), "kv_rank"),
        (lambda: LatentSpec(-1, 4, 2), "q_rank"),
        (lambda: LatentSpec(4, 4, 2, scale=0.0), "scale"),
        (lambda: block_of(None), "needs latent"),
        (lambda: block_of(attention_type="mha"), "belongs to no other type"),
        (lambda: block_of(qk_norm=True), "normalises its latents"),
        (lambda: block_of(rope_theta=None), "rope_dim"),
        (lambda: block_of(replace(LATENT, rope_dim=0)), "rope_dim"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("q_rank", [0, 10])
def test_a_layer_is_that_of_deepseek_v3(q_rank):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank or None,
        kv_lora_rank=6,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=5,
        max_position_embeddings=64,
    )
    config._attn_implementation = "sdpa"
    theirs = modeling.DeepseekV3Attention(config, 0).double()
    ours = attention_of(block_of(replace(LATENT, q_rank=q_rank), norm_eps=1e-6))
    names = {
        "q": "q_proj",
        "q_down": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "q_up": "q_b_proj",
        "o": "o_proj",
    }
    names |= {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs.get_parameter(f"{names[name.split('.')[0]]}.weight").copy_(parameter)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    rotary = modeling.DeepseekV3RotaryEmbedding(config)(x, torch.arange(9)[None])
    expected = theirs(x, position_embeddings=rotary, attention_mask=None)[0]
    torch.testing.assert_close(ours(x, context_of(9)), expected, rtol=1e-5, atol=1e-6)
