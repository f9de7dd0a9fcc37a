"""Building racks: factories, wrong inputs, registries, initialisation, counting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from stackwise import (
    Block,
    StackWiseConfig,
    create_rack_from_config,
    create_rack_from_specs,
    create_simple_rack,
    create_stack_from_config,
)
from stackwise.curriculum.growth import grow
from stackwise.curriculum.stage import Growth
from stackwise.model.describe import rack_spec
from stackwise.model.flops import step_flops
from stackwise.model.rack import Rack
from stackwise.model.registry import FEED_FORWARDS
from stackwise.model.spec import RackSpec


def config(**model):
    model = {"d_model": 32, "n_heads": 4, "vocab_size": 53, "max_seq_len": 32, **model}
    return StackWiseConfig.from_dict({"model": model, "training": {"seq_len": 32}})


def test_simple_rack_has_the_size_it_was_asked_for():
    rack = create_simple_rack(2, 4, 512, 2048, 8, 10000)
    assert (len(rack.stacks), len(rack.blocks())) == (2, 8)
    per_block = 4 * 512 * 512 + 3 * 512 * 2048 + 2 * 512
    assert rack.get_parameter_count() == 8 * per_block + 512 + 10000 * 512
    assert rack.is_tied
    assert rack.get_lm_head().matrix is rack.get_embedding_layer().weight


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_simple_rack(0, 1, 32, 64, 4, 50), ValueError, "n_stacks must be at least 1, got 0"),
        (lambda: create_simple_rack(1, 0, 32, 64, 4, 50), ValueError, "blocks_per_stack must be at least 1"),
        (lambda: create_simple_rack(1, 1, 32, 64, 5, 50), ValueError, "n_heads must divide d_model"),
        (lambda: create_simple_rack(1, 1, 12, 64, 4, 50), ValueError, "even head width"),
        (lambda: create_simple_rack(1, 1, 32, 64, 4, 50, n_kv_heads=3), ValueError, "n_kv_heads must divide"),
        (lambda: create_simple_rack(1, 1, 32, 64, 4, 50, n_kv_heads=8), ValueError, "n_kv_heads must divide"),
        (lambda: create_simple_rack(1, 1, 32, 64, 4, 1), ValueError, "vocab_size must be at least 2"),
        (lambda: create_simple_rack(1, 1, 32, 64, 4, 50, dropout=1.2), ValueError, r"dropout must be in"),
        (lambda: create_simple_rack(1, 1, 32, 64, 4, 50, qk_nrom=True), TypeError, "did you mean 'qk_norm'"),
        (
            lambda: create_simple_rack(1, 1, 32, 64, 4, 50, ffn_type="swigul"),
            ValueError,
            "did you mean 'swiglu'",
        ),
        (lambda: create_simple_rack(1, 1, 32, 64, 4, 50, norm="rms"), ValueError, "unknown norm"),
        (lambda: create_simple_rack(1, 1, 32, 64, 4, 50, short_conv=2), ValueError, "has no middle"),
        (
            lambda: create_simple_rack(1, 1, 32, 64, 4, 50, attention_preset="custom"),
            ValueError,
            "needs attention_custom",
        ),
        (lambda: create_stack_from_config(0, 0, config()), ValueError, "n_blocks must be at least 1"),
        (lambda: Block(d_model=32), TypeError, "n_heads"),
    ],
)
def test_wrong_shapes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_specs_make_unlike_stacks_and_refuse_what_does_not_fit():
    def spec(stack_id, **block):
        return {"stack_id": stack_id, "n_blocks": 1, "block_spec": {"n_heads": 4, **block}}

    rows = [spec(1, causal=True, n_kv_heads=1), spec(0, ffn_type="gelu", norm="layernorm", bias=True)]
    rack = create_rack_from_specs(53, 32, rows)
    assert [s.uid for s in rack.stacks] == ["s0", "s1"]
    assert not rack.is_causal
    rack(torch.randint(0, 53, (2, 9))).sum().backward()
    frozen = create_rack_from_specs(53, 32, [{**spec(0), "freeze_blocks": True}, spec(1)])
    assert not any(p.requires_grad for p in frozen.stacks[0].parameters())
    with pytest.raises(ValueError, match="stack_id must be unique"):
        create_rack_from_specs(53, 32, [spec(0), spec(0)])
    with pytest.raises(ValueError, match="32 wide, got 64"):
        create_rack_from_specs(53, 32, [spec(0, d_model=64)])
    with pytest.raises(TypeError, match="unknown key 'n_block'"):
        create_rack_from_specs(53, 32, [{**spec(0), "n_block": 2}])
    with pytest.raises(ValueError, match="is empty"):
        create_rack_from_specs(53, 32, [])


def test_config_dict_and_yaml_give_the_same_rack(tmp_path):
    a = config(qk_norm=True, ffn_type="geglu")
    a.to_yaml(tmp_path / "c.yaml")
    racks = [
        create_rack_from_config(c) for c in (a, a.to_dict(), StackWiseConfig.from_yaml(tmp_path / "c.yaml"))
    ]
    first = racks[0].state_dict()
    for rack in racks[1:]:
        assert rack.state_dict().keys() == first.keys()
        assert all(torch.equal(first[name], tensor) for name, tensor in rack.state_dict().items())
    assert len(create_stack_from_config(0, 4, a).blocks) == 4


def test_bad_ids_and_lengths_are_told():
    rack = create_rack_from_config(config())
    with pytest.raises(TypeError, match="must be integers"):
        rack(torch.rand(1, 4))
    with pytest.raises(IndexError, match="token id 53 is outside the vocabulary of 53"):
        rack(torch.tensor([[1, 53]]))
    with pytest.raises(IndexError, match="token id -1"):
        rack(torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match="33 tokens are more than max_seq_len = 32"):
        rack(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 4\]"):
        rack(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3))
    with pytest.raises(IndexError, match=r"stacks 0\.\.9"):
        rack.forward_from_stack(torch.zeros(1, 4, 32), 0, 9)


def test_running_the_stacks_by_hand_is_the_forward_pass():
    rack = create_rack_from_config(config())
    ids = torch.randint(0, 53, (2, 8))
    middle = rack.forward_from_stack(rack.look_up(ids), 0, 1)
    assert torch.equal(rack.head(rack.forward_from_stack(middle, 1)), rack(ids))


def test_frozen_up_projections_survive_unfreezing_in_every_factory():
    options = {"freeze_up_proj": True, "dropout": 0.25}
    racks = [
        create_simple_rack(2, 1, 32, 64, 4, 53, **options),
        create_rack_from_config(config(**options)),
        create_rack_from_specs(
            53, 32, [{"stack_id": 0, "n_blocks": 2, "block_spec": {"n_heads": 4, **options}}]
        ),
    ]
    for rack in racks:
        for stack in rack.stacks:
            stack.freeze_all()
            stack.unfreeze_all()
            for block in stack.blocks:
                assert not block.ffn.up.weight.requires_grad
                assert block.ffn.gate.weight.requires_grad
                assert block.attn.dropout == block.dropout.p == 0.25


def test_a_feed_forward_of_ones_own_takes_five_lines():
    @FEED_FORWARDS.register("doubling")
    class Doubling(torch.nn.Module):
        def __init__(self, spec):
            super().__init__()
            self.down = torch.nn.Linear(spec.d_model, spec.d_model)

        def forward(self, x):
            return 2 * self.down(x)

    rack = create_rack_from_config(config(ffn_type="doubling"))
    rack(torch.randint(0, 53, (1, 5))).sum().backward()
    assert type(rack.stacks[0].blocks[0].ffn) is Doubling
    with pytest.raises(ValueError, match="already registered"):
        FEED_FORWARDS.register("doubling")(Doubling)


@pytest.mark.parametrize(
    ("ffn_type", "formula"),
    [
        ("swiglu", lambda g, u: F.silu(g) * u),
        ("geglu", lambda g, u: F.gelu(g) * u),
        ("gelu", lambda g, u: F.gelu(u)),
        ("gelu_tanh", lambda g, u: F.gelu(u, approximate="tanh")),
        ("silu", lambda g, u: u * torch.sigmoid(u)),
        ("relu", lambda g, u: u.clamp_min(0)),
        ("relu2", lambda g, u: u.clamp_min(0) ** 2),
    ],
)
@pytest.mark.parametrize("placement", ["pre", "post", "both"])
def test_blocks_equal_their_formula(ffn_type, formula, placement):
    block = Block(
        d_model=32, n_heads=4, ffn_type=ffn_type, norm_placement=placement, residual_gain=0.5, bias=True
    ).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 32, dtype=torch.float64)

    def norm(m, y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight

    def feed(y):
        gate = F.linear(y, block.ffn.gate.weight, block.ffn.gate.bias) if hasattr(block.ffn, "gate") else y
        up = F.linear(y, block.ffn.up.weight, block.ffn.up.bias)
        return F.linear(formula(gate, up), block.ffn.down.weight, block.ffn.down.bias)

    from stackwise.model.block import Context
    from stackwise.model.visibility import Visibility

    context = Context(Visibility(7), None, 64)

    def attend(y):
        return block.attn(y, context)

    if placement == "pre":
        y = x + 0.5 * attend(norm(block.attn_norm, x))
        expected = y + 0.5 * feed(norm(block.ffn_norm, y))
    elif placement == "both":
        y = x + 0.5 * norm(block.attn_out_norm, attend(norm(block.attn_norm, x)))
        expected = y + 0.5 * norm(block.ffn_out_norm, feed(norm(block.ffn_norm, y)))
    else:
        y = norm(block.attn_norm, x + 0.5 * attend(x))
        expected = norm(block.ffn_norm, y + 0.5 * feed(y))
    torch.testing.assert_close(block(x, context), expected, atol=1e-9, rtol=1e-9)


def test_with_a_residual_gain_of_zero_every_block_is_the_identity_and_with_one_it_is_plain():
    ids = torch.randint(0, 53, (2, 5))
    still, plain, full = (Rack(rack_spec(config(residual_gain=g)), seed=3) for g in (0.0, None, 1.0))
    assert torch.equal(still(ids), still.head(still.norm(still.look_up(ids))))
    assert torch.equal(plain(ids), full(ids))
    assert not torch.equal(plain(ids), still(ids))


def test_a_rack_built_at_once_starts_like_one_grown_stack_by_stack():
    spec = rack_spec(config())
    whole = Rack(spec, seed=7)
    grown = Rack(spec.with_stacks(spec.stacks[:1]), seed=7)
    grown = grow(grown, Growth("append", len(spec.stacks[1].blocks), "random"), seed=7)[0]
    assert whole.state_dict().keys() == grown.state_dict().keys()
    assert all(torch.equal(t, grown.state_dict()[n]) for n, t in whole.state_dict().items())
    other = Rack(spec, seed=8).state_dict()
    assert not torch.equal(other["embedding.weight"], whole.state_dict()["embedding.weight"])


def test_specs_survive_json():
    import json

    spec = rack_spec(config(short_conv=2, qk_norm=True))
    assert RackSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_of_the_operations(tied):
    from torch.utils.flop_counter import FlopCounterMode

    spec = rack_spec(config(tie_embeddings=tied, attention_preset="gpt_style"))
    rack = Rack(spec)
    ids = torch.randint(0, 53, (2, 32))
    with FlopCounterMode(display=False) as counter:
        rack(ids).sum().backward()
    counted = counter.get_total_flops() / ids.numel()
    everything = {"embedding", "stack:s0", "stack:s1", "norm", "head"}
    assert step_flops(spec, everything, 32) == pytest.approx(counted, rel=0.15)


def test_frozen_prefixes_and_suffixes_cost_what_the_units_say():
    spec = replace(rack_spec(config(vocab_size=2, d_ff=96), 4), tail=())
    everything = step_flops(spec, {"embedding", *(f"stack:s{i}" for i in range(4)), "norm", "head"}, 1)
    last = step_flops(spec, {"stack:s3", "norm", "head"}, 1)
    first = step_flops(spec, {"stack:s0"}, 1)
    # units of one stack's forward pass: 4 x 3; 3 x 1 + 3; 3 + 3 x 2
    assert last / everything == pytest.approx(6 / 12, rel=0.02)
    assert first / everything == pytest.approx(9 / 12, rel=0.02)
