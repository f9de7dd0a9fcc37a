"""Who sees whom, and where: causality, padding, documents, rotary positions, grouped heads."""

from __future__ import annotations

import pytest
import torch

from stackwise import create_simple_rack
from stackwise.kernels.rotary import rotary_table, rotate, rotate_reference
from stackwise.model.rope_scaling import frequencies

VOCAB = 61


def make(**options):
    options = {"attention_preset": "gpt_style", "tie_embeddings": False, "max_seq_len": 64, **options}
    rack = create_simple_rack(2, 2, 32, 64, 4, VOCAB, **options).eval()
    with torch.no_grad():  # away from the start, where norms are ones
        for parameter in rack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rack


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length))


VARIANTS = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "qk_norm": True},
    {"use_rope": False},
    {"short_conv": 3},
    {"head_width": 12, "attention_bias": "qkv", "n_kv_heads": 2},
    {"norm_placement": "both", "attention_bias": "all"},
    {"window": 4},
    {"window": 3, "sinks": 2, "n_kv_heads": 2, "short_conv": 3},
    {"use_rope": False, "alibi": True},
    {"use_rope": False, "alibi": True, "window": 5, "sinks": 1, "softcap": 2.0},
    {"softcap": 0.5, "n_kv_heads": 2, "parallel": True},
    {"attn_input_norm": False},
    {"norm_placement": "post", "norm": "layernorm", "bias": True, "ffn_type": "gelu"},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_future_never_leaks(options, masked):
    rack, ids = make(**options), random_ids(2, 16)
    mask = None
    if masked:
        mask = torch.ones(2, 16, dtype=torch.bool)
        mask[0, :3] = False
    before = rack(ids, mask)
    for position in (5, 9, 15):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = rack(changed, mask)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


def test_a_bidirectional_rack_sees_the_future():
    rack, ids = make(attention_preset="bert_style"), random_ids(1, 12)
    changed = ids.clone()
    changed[:, 11] = (changed[:, 11] + 1) % VOCAB
    assert not torch.equal(rack(changed)[:, 0], rack(ids)[:, 0])
    assert not rack.is_causal


@pytest.mark.parametrize("options", VARIANTS)
def test_padded_packed_and_alone_give_the_same_logits(options):
    rack = make(**options)
    a, b = random_ids(1, 9), random_ids(1, 14)
    alone = [rack(a), rack(b)]
    junk = random_ids(1, 5)

    right = torch.cat([a, junk], 1)
    mask = torch.tensor([[1] * 9 + [0] * 5, [1] * 14])
    logits = rack(torch.cat([right, b]), mask)
    torch.testing.assert_close(logits[:1, :9], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], alone[1], atol=1e-5, rtol=1e-5)

    left = torch.cat([junk, a], 1)
    mask = torch.tensor([[0] * 5 + [1] * 9, [1] * 14])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = rack(torch.cat([left, b]), mask, position_ids=positions)
    torch.testing.assert_close(logits[:1, 5:], alone[0], atol=1e-5, rtol=1e-5)

    packed = torch.cat([a, b], 1)
    documents = torch.tensor([[0] * 9 + [1] * 14])
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    logits = rack(packed, document_ids=documents, position_ids=positions)
    torch.testing.assert_close(logits[:, :9], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, 9:], alone[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["gpt_style", "bert_style"])
def test_a_row_that_sees_nothing_gets_nothing_from_attention(preset):
    rack = make(attention_preset=preset)
    seen = []
    rack.stacks[0].blocks[0].attn.o.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0] = False
    mask[1, :3] = False
    logits = rack(random_ids(2, 8), mask)
    assert logits.isfinite().all()
    assert (seen[0][0] == 0).all()
    if preset == "gpt_style":
        assert (seen[0][1, :3] == 0).all()
    assert not (seen[0][1, 3:] == 0).all()


@pytest.mark.parametrize("options", VARIANTS)
def test_the_cache_gives_the_logits_of_the_full_pass(options):
    rack, ids = make(**options), random_ids(2, 20)
    with torch.no_grad():
        full = rack(ids)
        cache = rack.make_cache(2, 20)
        pieces = [rack(ids[:, :7], cache=cache), rack(ids[:, 7:10], cache=cache)]
        pieces += [rack(ids[:, i : i + 1], cache=cache) for i in range(10, 20)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-5, rtol=1e-5)


def test_only_distances_matter_to_rotary_positions():
    rack, ids = make(), random_ids(2, 10)
    near = rack(ids, position_ids=torch.arange(10).expand(2, -1))
    far = rack(ids, position_ids=torch.arange(40, 50).expand(2, -1))
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)
    spread = rack(ids, position_ids=2 * torch.arange(10).expand(2, -1))
    assert not torch.allclose(near, spread, atol=1e-3)


def test_rotation_equals_sines_and_cosines():
    x = torch.randn(2, 11, 3, 8, dtype=torch.float64)
    table = rotary_table(frequencies(8, 500.0), 1.0, 64, torch.device("cpu"), True)
    torch.testing.assert_close(
        rotate(x, table[5:16]), rotate_reference(x, torch.arange(5, 16), 500.0), atol=1e-12, rtol=0
    )


def test_grouped_heads_with_tied_copies_are_multi_head_attention():
    grouped = make(n_kv_heads=2)
    full = make()
    state = full.state_dict()
    for name, tensor in grouped.state_dict().items():
        if name.endswith(("attn.k.weight", "attn.v.weight")):
            state[name] = tensor.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
        else:
            state[name] = tensor
    full.load_state_dict(state)
    ids = random_ids(2, 13)
    torch.testing.assert_close(full(ids), grouped(ids), atol=1e-5, rtol=1e-5)
