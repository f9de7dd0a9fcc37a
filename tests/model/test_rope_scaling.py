"""Scaled rotary positions: the angles are those of Transformers, and what shares a batch with a row does not matter."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import pytest
import torch

from stackwise import StackWiseConfig, create_rack_from_config, create_simple_rack
from stackwise.inference.plan import uncovered
from stackwise.kernels.rotary import rotate
from stackwise.model.attention.rotary import Rotary
from stackwise.model.block import Context
from stackwise.model.block_spec import BlockSpec
from stackwise.model.rope_scaling import RopeScaling, frequencies
from stackwise.model.visibility import Visibility

VOCAB, TRAINED, LONGEST, WIDTH = 61, 32, 128, 16
LISTS = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [1 + 0.7 * i for i in range(8)]}
KINDS = {
    "linear": {"type": "linear"},
    "dynamic": {"type": "dynamic"},
    "yarn": {"type": "yarn"},
    "yarn as DeepSeek": {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16.0},
    "yarn of half pairs": {"type": "yarn", "truncate": False, "attention_factor": 1.3, "beta_slow": 2.0},
    "llama3": {"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"type": "longrope", **LISTS},
}


def scaling_of(kind: str, factor: float = 4.0, trained: int = TRAINED) -> RopeScaling:
    return RopeScaling(factor=factor, original_max_seq_len=trained, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [TRAINED // 2, TRAINED, TRAINED + 1, LONGEST])
def test_angles_and_magnitude_are_those_of_transformers(kind, length):
    transformers = pytest.importorskip("transformers", reason="needs pip install 'stackwise[hf]'")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, factor = random.choice([1e4, 5e5]), random.choice([2.0, 4.0, 7.5])
    names = dict(KINDS[kind])
    rope = names.pop("type")
    # a model of theirs whose longest row is the trained one, as their dynamic scaling reads it
    parameters = {"rope_type": rope, "rope_theta": theta, "factor": factor, **names}
    if rope not in ("linear", "dynamic"):
        parameters["original_max_position_embeddings"] = TRAINED
    config = transformers.LlamaConfig(
        hidden_size=4 * WIDTH,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        rope_parameters=parameters,
    )
    theirs, magnitude = ROPE_INIT_FUNCTIONS[rope](config, torch.device("cpu"), seq_len=length)
    scaling = scaling_of(kind, factor)
    ours = torch.tensor(frequencies(WIDTH, theta, scaling, length), dtype=torch.float64)
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-6, atol=1e-9)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    by_tensor = Rotary(WIDTH, theta, scaling)
    if by_tensor.depends_on_length:
        at = by_tensor._frequencies_at(torch.tensor([[length]]))
        torch.testing.assert_close(at[0, 0], ours, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_turns_by_position_times_angle(kind):
    scaling, length = scaling_of(kind), 48
    rotary = Rotary(WIDTH, 1e4, scaling)
    x = torch.randn(1, length, 2, WIDTH, dtype=torch.float64)
    context = Context(Visibility(length), None, LONGEST)
    turned = rotate(x, rotary.factors(context, x.flatten(-2)))
    angles = torch.outer(
        torch.arange(length).double(), torch.tensor(frequencies(WIDTH, 1e4, scaling, length)).double()
    )[None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    plain = torch.stack(
        (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()), -1
    )
    torch.testing.assert_close(turned, scaling.magnitude * plain.flatten(-2), rtol=0, atol=1e-6)


def make(kind: str, **options):
    options = {"attention_preset": "gpt_style", "max_seq_len": LONGEST, **options}
    rack = create_simple_rack(
        1, 2, 4 * WIDTH, 64, 4, VOCAB, rope_scaling=scaling_of(kind, trained=10), **options
    )
    return rack.double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_what_shares_their_batch(kind):
    """One sequence within the trained length, one beyond it: padded left and right, packed, and alone."""
    rack = make(kind)
    a, b, junk = (torch.randint(0, VOCAB, (1, n)) for n in (8, 15, 7))
    alone = [rack(a), rack(b)]
    mask = torch.tensor([[1] * 8 + [0] * 7, [1] * 15])
    right = rack(torch.cat([torch.cat([a, junk], 1), b]), mask)
    torch.testing.assert_close(right[:1, :8], alone[0])
    torch.testing.assert_close(right[1:], alone[1])
    positions = (mask.flip(1).cumsum(1) - 1).clamp_min(0)
    left = rack(torch.cat([torch.cat([junk, a], 1), b]), mask.flip(1), position_ids=positions)
    torch.testing.assert_close(left[:1, 7:], alone[0])
    packed = rack(
        torch.cat([a, b], 1),
        document_ids=torch.tensor([[3] * 8 + [1] * 15]),
        position_ids=torch.cat([torch.arange(8), torch.arange(15)])[None],
    )
    torch.testing.assert_close(packed[:, :8], alone[0])
    torch.testing.assert_close(packed[:, 8:], alone[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_turns_keys_for_the_length_it_was_made_for(kind):
    rack, ids = make(kind), torch.randint(0, VOCAB, (2, 24))
    cache = rack.make_cache(2, 24)
    pieces = [rack(ids[:, :5], cache=cache), rack(ids[:, 5:9], cache=cache)]
    pieces += [rack(ids[:, i : i + 1], cache=cache) for i in range(9, 24)]
    torch.testing.assert_close(torch.cat(pieces, 1), rack(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_continues_as_the_full_pass_does(kind):
    rack = make(kind).float()
    assert (uncovered(rack) is not None) == scaling_of(kind).depends_on_length
    prompt = torch.randint(0, VOCAB, (2, 6))
    out = rack.generate(prompt, max_new_tokens=18, temperature=0.0)
    logits = rack(out)[:, 5:-1]
    chosen = logits.gather(-1, out[:, 6:, None]).squeeze(-1)
    assert bool((logits.amax(-1) - chosen <= 1e-4).all())


def test_without_scaling_a_longer_row_is_refused_with_both_numbers_and_the_way_out():
    rack = create_simple_rack(1, 1, 16, 32, 2, VOCAB, max_seq_len=2048)
    with pytest.raises(ValueError, match=r"4096 tokens.*2048.*model\.rope_scaling"):
        rack(torch.zeros(1, 4096, dtype=torch.int64))
    options = {"rope_scaling": RopeScaling("yarn", 2.0, 2048), "max_seq_len": 4096}
    longer = create_simple_rack(1, 1, 16, 32, 2, VOCAB, **options)
    assert longer(torch.zeros(1, 4096, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_survive_json(kind):
    spec = make(kind).spec
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    block = spec.blocks[0]
    assert BlockSpec.create({**asdict(block), "rope_scaling": block.rope_scaling}) == block


def test_the_config_fills_in_what_follows_from_the_longest_row():
    def built(**keys):
        model = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 2, "max_seq_len": 96, "rope_scaling": keys}
        rack = create_rack_from_config(
            StackWiseConfig.from_dict({"model": model, "training": {"seq_len": 8}})
        )
        return rack.spec.blocks[0].rope_scaling

    assert built(type="yarn", factor=4.0) == RopeScaling("yarn", 4.0, 24)
    assert built(type="yarn", original_max_seq_len=32) == RopeScaling("yarn", 3.0, 32)
    assert built(type="llama3", factor=8.0, original_max_seq_len=32) == RopeScaling("llama3", 8.0, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "yearn"}, "did you mean 'yarn'"),
        ({"factor": 0.5}, "at least 1, got 0.5"),
        ({"original_max_seq_len": 1}, "at least 2, got 1"),
        ({"beta_slow": 40.0}, "beta_fast must be above beta_slow"),
        ({"mscale": 1.0}, "given together"),
        ({"type": "linear", "truncate": False}, "truncate has no effect on rope_scaling linear"),
        ({"type": "llama3", "low_freq_factor": 5.0}, "high_freq_factor must be above"),
        ({"attention_factor": 0.0}, "attention_factor must be above 0"),
    ],
)
def test_wrong_scalings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"type": "yarn", "factor": 2.0, "original_max_seq_len": 64, **fields})


def test_factors_of_another_number_than_pairs_are_refused():
    scaling = replace(scaling_of("longrope"), long_factor=(1.0,) * 7)
    with pytest.raises(
        ValueError, match="long_factor needs 8 numbers above 0, one per pair of a head, got 7"
    ):
        BlockSpec(d_model=4 * WIDTH, n_heads=4, rope_scaling=scaling)
    with pytest.raises(ValueError, match="no rotation to scale"):
        BlockSpec(d_model=64, n_heads=4, rope_theta=None, rope_scaling=scaling_of("yarn"))
