"""What a token may look at: windows, sinks, ALiBi, soft caps; and that nothing else reaches it.

The plainest reference: an explicit loop over pairs of tokens says who sees whom, and attention is the formula on it.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stackwise import create_rack_from_specs, create_simple_rack
from stackwise.inference.plan import uncovered
from stackwise.kernels.attention import attention
from stackwise.model.alibi import slopes
from stackwise.model.attention.mha import Attention
from stackwise.model.attention_flops import attention_flops
from stackwise.model.block import Block, Context
from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import KeyValueCache
from stackwise.model.expert_spec import ExpertSpec
from stackwise.model.parts import KernelSpec, LatentSpec
from stackwise.model.rack import Rack
from stackwise.model.visibility import Visibility, held_tokens

VOCAB = 31


def sees(
    i: int, j: int, causal: bool, window: int | None, sinks: int, row: list[bool], documents: list[int]
) -> bool:
    """Whether token i sees token j, by the definition."""
    if not row[j] or documents[i] != documents[j] or (causal and j > i):
        return False
    rank = sum(row[k] and documents[k] == documents[j] for k in range(j))  # real tokens of the text before it
    return window is None or abs(i - j) < window or rank < sinks


def seen_by(spec: BlockSpec, padding: Tensor, documents: Tensor) -> Tensor:
    """bool [B, T, T] of the definition."""
    n_rows, n = padding.shape
    return torch.tensor(
        [
            [
                [
                    sees(
                        i, j, spec.causal, spec.window, spec.sinks, padding[b].tolist(), documents[b].tolist()
                    )
                    for j in range(n)
                ]
                for i in range(n)
            ]
            for b in range(n_rows)
        ]
    )


def reference(layer: Attention, spec: BlockSpec, x: Tensor, seen: Tensor) -> Tensor:
    """The formula of attention, head by head, in x's dtype; positions by ALiBi or none."""
    groups = spec.n_heads // spec.n_kv_heads
    q, k, v = (f(x).unflatten(-1, (-1, spec.head_dim)) for f in (layer.q, layer.k, layer.v))
    n, heads = x.shape[1], []
    distance = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs()
    for h in range(spec.n_heads):
        scores = q[:, :, h] @ k[:, :, h // groups].mT / math.sqrt(spec.head_dim)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if spec.alibi:
            scores = scores - slopes(spec.n_heads)[h] * distance
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
        heads.append(weights @ v[:, :, h // groups])
    return layer.o(torch.cat(heads, -1))


KINDS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 3, "sinks": 2},
    {"window": 50},
    {"alibi": True},
    {"alibi": True, "window": 4, "sinks": 1, "n_kv_heads": 1},
    {"softcap": 0.7},
    {"softcap": 3.0, "alibi": True, "window": 2, "sinks": 3, "n_kv_heads": 2},
]


LATENT: list[dict[str, Any]] = [
    {"attention_type": "mla", "latent": LatentSpec(6, 5, 0), **kind} for kind in ({}, *KINDS[2:])
]

KERNELS: list[dict[str, Any]] = [
    {**latent, "kernel": kernel, **more}
    for latent in ({}, LATENT[0])
    for kernel, more in (
        (KernelSpec("gaussian", features=8), {}),
        (KernelSpec("laplacian", "exact"), {"alibi": True}),
        (KernelSpec("laplacian", features=8, norm="l1"), {"window": 2, "sinks": 1}),
        (KernelSpec("gaussian", "linear", features=8), {}),
        (KernelSpec("linear", "linear", features=8), {}),
    )
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("padded", "packed"), [(True, True), (True, False), (False, True), (False, False)])
def test_attention_is_its_formula_under_all_masks_at_once(kind, causal, padded, packed):
    spec = BlockSpec(d_model=24, n_heads=4, causal=causal, rope_theta=None, head_width=5, **kind)
    layer = Attention(spec).double()
    x = torch.randn(3, 9, 24, dtype=torch.float64)
    padding = torch.ones(3, 9, dtype=torch.bool)
    padding[0, :3] = False
    padding[1, 7:] = False
    documents = torch.tensor([[0] * 5 + [4] * 4, [2] * 9, [1] * 2 + [0] * 6 + [7]])
    padding = padding if padded else torch.ones_like(padding)
    documents = documents if packed else torch.zeros_like(documents)
    sight = Visibility(9, 0, padding if padded else None, documents if packed else None)
    context = Context(sight, None, 64)
    seen = seen_by(spec, padding, documents)
    torch.testing.assert_close(layer(x, context), reference(layer, spec, x, seen))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_an_invisible_token_never_changes_anything(data):
    """Any attention, any mask: logits of the rows that cannot see a token, even in two steps, are the same bit by bit."""
    kind = data.draw(st.sampled_from(KINDS + LATENT + KERNELS))
    causal = data.draw(st.booleans())
    n = data.draw(st.integers(2, 10))
    padded, packed = data.draw(st.booleans()), data.draw(st.booleans())
    padding = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) if padded else [True] * n]
    )
    lists = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    documents = torch.tensor([sorted(data.draw(lists)) if packed else [0] * n])
    conv = data.draw(st.sampled_from([0, 3]))
    rope = not kind.get("alibi") and "latent" not in kind and data.draw(st.booleans())
    more = data.draw(
        st.sampled_from([{}, {"parallel": True}, {"norm_placement": "both"}, {"norm_placement": "post"}])
    )
    rack = make(causal, rope, short_conv=conv, **kind, **more)
    numbers = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    ids = torch.randint(0, VOCAB, (1, n), generator=numbers)
    changed_at = data.draw(st.integers(0, n - 1))
    other = ids.clone()
    other[0, changed_at] = (ids[0, changed_at] + 1) % VOCAB
    spec = rack.spec.blocks[0]
    reach = seen_by(spec, padding, documents)[0] | torch.eye(n, dtype=torch.bool)
    if conv:  # the convolution looks at neighbours of the same document, padding left out
        lags = range(3) if causal else range(-1, 2)
        near = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for lag in lags:
                j = i - lag
                if 0 <= j < n and documents[0, i] == documents[0, j] and bool(padding[0, j]):
                    near[i, j] = True
        reach = (near.float() @ reach.float() @ near.float() @ near.float() + reach.float()) > 0
    twice = reach.float() @ reach.float() > 0
    with torch.no_grad():
        runs = [
            rack(row, padding if padded else None, document_ids=documents if packed else None)
            for row in (ids, other)
        ]
    same = (runs[0] == runs[1]).all(-1)[0]
    blind = ~twice[:, changed_at]
    assert bool(same[blind].all())
    assert not bool(same[changed_at])


def make(causal: bool, rope: bool = True, **options: Any) -> Rack:
    preset = "gpt_style" if causal else "bert_style"
    rack = create_simple_rack(
        1, 2, 16, 24, 4, VOCAB, attention_preset=preset, use_rope=rope, max_seq_len=64, seed=3, **options
    )
    if not rope and not options.get("alibi"):
        with torch.no_grad():
            rack.positions.weight.normal_()
    return rack.eval()


@pytest.mark.parametrize(
    "kind", [{}, {"alibi": True}, LATENT[0], {**LATENT[0], "alibi": True, "softcap": 1.5}]
)
@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_bounded_cache_gives_what_the_dense_mask_gives(window, sinks, kind):
    rack = make(True, rope=not kind, window=window, sinks=sinks, n_kv_heads=2, **kind).double()
    ids = torch.randint(0, VOCAB, (2, 24))
    dense = rack(ids)
    for cuts in ([24], [1] * 24, [7, 1, 1, 1, 5, 1, 8], [2, 9, 13]):
        cache = rack.make_cache(2, 24)
        parts = [rack(part, cache=cache) for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), dense)
        for block in cache.blocks:
            buffers = [block.keys, block.values] if isinstance(block, KeyValueCache) else [block.held]
            assert {buffer.shape[-2] for buffer in buffers} == {window + sinks}
            assert block.length == 24


def test_a_bounded_cache_knows_padding():
    rack = make(True, window=3).double()
    ids = torch.randint(0, VOCAB, (2, 14))
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, :5] = False
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    cache, parts, at = rack.make_cache(2, 14), [], 0
    for n in (6, 1, 1, 2, 1, 3):
        parts.append(
            rack(ids[:, at : at + n], mask[:, : at + n], position_ids=positions[:, at : at + n], cache=cache)
        )
        at += n
    together = torch.cat(parts, 1)
    torch.testing.assert_close(together[:1, 5:], rack(ids[:1, 5:]))
    torch.testing.assert_close(together[1:], rack(ids[1:]))


def test_sinks_and_left_padding_do_not_share_a_cache():
    rack = make(True, window=2, sinks=2)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_sinks and rows that are padded on the left"):
        rack(torch.zeros(2, 5, dtype=torch.int64), mask, cache=rack.make_cache(2, 9))
    assert rack(torch.zeros(2, 5, dtype=torch.int64), mask).isfinite().all()


@pytest.mark.parametrize("sinks", [0, 2])
def test_slots_hold_the_sinks_and_the_last_tokens(sinks):
    for n in range(1, 20):
        held = sorted(held_tokens(n, 4, sinks).tolist())
        assert held == sorted(
            {*range(min(n, sinks)), *range(max(0, n - 4), n)} | set(range(max(sinks, n - 4), n))
        )


@pytest.mark.parametrize(
    "options", [{"window": 3, "sinks": 1}, {"alibi": True}, {"softcap": 1.0}, {"parallel": True}]
)
def test_generation_with_changed_sight_continues_as_the_full_pass_does(options):
    rack = make(True, rope="alibi" not in options, **options)
    assert uncovered(rack)
    prompt = torch.randint(0, VOCAB, (2, 5))
    out = rack.generate(prompt, max_new_tokens=12, temperature=0.0)
    logits = rack(out)[:, 4:-1]
    chosen = logits.gather(-1, out[:, 5:, None]).squeeze(-1)
    assert bool((logits.amax(-1) - chosen <= 1e-4).all())


def test_slopes_of_alibi():
    assert slopes(8) == tuple(2.0**-h for h in range(1, 9))
    assert slopes(1) == (2.0**-8,)
    # 12 heads: those of 8, then every other one of 16
    assert slopes(12) == slopes(8) + tuple(2.0 ** (-h / 2) for h in (1, 3, 5, 7))
    for n in range(1, 70):
        assert len(set(slopes(n))) == n
        assert all(0 < m < 1 for m in slopes(n))


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_runs_beyond_the_trained_length_and_nothing_else_does(causal):
    rack = make(causal, rope=False, alibi=True)
    ids = torch.randint(0, VOCAB, (1, 128))
    assert rack(ids).isfinite().all()
    if causal:
        torch.testing.assert_close(rack(ids)[:, :64], rack(ids[:, :64]), atol=1e-5, rtol=1e-5)
        assert rack.generate(ids[:, :60], max_new_tokens=20).shape[1] == 80
    for rope in (True, False):
        with pytest.raises(ValueError, match=r"128 tokens are more than max_seq_len = 64"):
            make(causal, rope=rope)(ids)


def test_alibi_depends_on_order_and_symmetric_distance():
    rack = make(False, rope=False, alibi=True)
    ids = torch.randint(0, VOCAB, (1, 11))
    torch.testing.assert_close(rack(ids).flip(1), rack(ids.flip(1)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rack(ids[:, torch.randperm(11)]).sort(1)[0], rack(ids).sort(1)[0], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_attention_knows_bias_and_cap(dtype):
    """On the CPU bf16 has a blocked form of its own for masks; biases and caps go around it."""
    q, k, v = (torch.randn(2, 4, 33, 16).to(dtype) for _ in range(3))
    bias = Visibility(33).mask(True, 7, 2, slopes(4), dtype).bias
    visible = Visibility(33).mask(True, 7, 2).visible
    for softcap in (None, 2.0):
        wide = attention(q.double(), k.double(), v.double(), bias=bias.double(), softcap=softcap)
        close = {
            "atol": 2e-2 if dtype != torch.float32 else 1e-5,
            "rtol": 2e-2 if dtype != torch.float32 else 1e-5,
        }
        out = attention(q, k, v, bias=bias, softcap=softcap)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), wide, **close)
        wide = attention(q.double(), k.double(), v.double(), visible=visible, causal=True, softcap=softcap)
        out = attention(q, k, v, visible=visible, causal=True, softcap=softcap)
        torch.testing.assert_close(out.double(), wide, **close)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 0), (3, 2), (5, 4), (11, 3), (50, 60)])
def test_flops_count_the_tokens_in_sight(causal, window, sinks):
    spec = BlockSpec(d_model=16, n_heads=2, causal=causal, window=window, sinks=sinks)
    seen = seen_by(spec, torch.ones(1, 12, dtype=torch.bool), torch.zeros(1, 12))
    assert attention_flops(spec, 12) == pytest.approx(4 * 16 * int(seen.sum()) / 12)


def test_parallel_blocks_are_their_formula():
    block = Block(
        d_model=16, n_heads=2, parallel=True, residual_gain=0.5, norm="layernorm", bias=True
    ).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, context = torch.randn(2, 5, 16, dtype=torch.float64), Context(Visibility(5), None, 64)
    normed = block.attn_norm(x)
    expected = x + 0.5 * block.attn(normed, context) + 0.5 * block.ffn(normed)
    torch.testing.assert_close(block(x, context), expected)
    assert block.ffn_norm is None
    assert "ffn_norm.weight" not in block.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 4, "sinks": -1}, "sinks must not be negative"),
        ({"sinks": 2}, "sinks 2 without a window"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"alibi": True}, "alibi with rope_theta"),
        ({"parallel": True, "norm_placement": "post"}, "parallel needs norm_placement pre"),
        ({"parallel": True, "attn_input_norm": False}, "parallel needs norm_placement pre"),
        ({"attn_input_norm": False, "norm_placement": "post"}, "attn_input_norm false needs"),
        ({"norm_placement": "sandwich"}, "must be one of pre, post, both, got 'sandwich'"),
        ({"attention_bias": "some"}, "none, qkv or all, got 'some'"),
        ({"head_width": -1}, "head_width must not be negative"),
        ({"head_width": 3}, "even head width, got 3"),
    ],
)
def test_wrong_options_of_a_block_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockSpec(d_model=16, n_heads=2, **options)


def test_one_block_without_alibi_ends_at_the_trained_length():
    rows = [
        {"stack_id": i, "n_blocks": 1, "block_spec": {"n_heads": 2, "alibi": alibi}}
        for i, alibi in enumerate((True, False))
    ]
    mixed = create_rack_from_specs(VOCAB, 16, rows, use_rope=False, max_seq_len=8)
    assert mixed.spec.positions == "learned"
    with pytest.raises(ValueError, match="9 tokens are more than max_seq_len = 8"):
        mixed(torch.zeros(1, 9, dtype=torch.int64))
    endless = create_rack_from_specs(VOCAB, 16, rows[:1], use_rope=False, max_seq_len=8)
    assert endless(torch.zeros(1, 9, dtype=torch.int64)).isfinite().all()


def test_latent_windowed_and_expert_stacks_train_in_one_rack():
    """Each stack of another kind, one of them causal; a step changes every tensor that trains."""
    rows = [
        {"attention_type": "mla", "latent": LatentSpec(6, 5, 4), "window": 3, "sinks": 1},
        {"window": 4, "norm_placement": "both", "experts": ExpertSpec(3, 2, width=8), "causal": True},
        {"alibi": True, "rope_theta": None, "parallel": True, "softcap": 3.0},
    ]
    specs = [
        {"stack_id": i, "n_blocks": 1, "block_spec": {"n_heads": 2, **row}} for i, row in enumerate(rows)
    ]
    rack = create_rack_from_specs(VOCAB, 16, specs, tie_embeddings=False, max_seq_len=32)
    assert not rack.is_causal
    assert type(rack.spec).from_dict(json.loads(json.dumps(rack.spec.to_dict()))) == rack.spec
    before = {name: tensor.clone() for name, tensor in rack.named_parameters()}
    rack(torch.arange(28).view(2, 14)).square().mean().backward()
    torch.optim.SGD(rack.parameters(), lr=0.5).step()
    same = [name for name, tensor in rack.named_parameters() if torch.equal(tensor, before[name])]
    assert same == []
