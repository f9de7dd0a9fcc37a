"""Generation with a cache is what repeated full passes would give."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stackwise.inference import decoder as decoder_module
from stackwise.inference import plan
from stackwise.inference.decoder import Decoder
from stackwise.inference.generate import generate
from stackwise.model.factory import create_rack_from_specs, create_simple_rack
from stackwise.model.feed_forward import FeedForward
from stackwise.model.rack import Rack

V = 23


def rack_of(n_stacks: int = 2, **options: Any) -> Rack:
    """A causal rack whose parameters all differ from their neutral start."""
    options = {"attention_preset": "gpt_style", "max_seq_len": 48, **options}
    rack = create_simple_rack(n_stacks, 1, 16, 24, 4, V, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rack.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return rack


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    ids, mask = prompts(len(lengths), width), torch.ones(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = False
    return ids, mask


@pytest.fixture(params=["plan", "modules"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of decoding: the prepared plan, and the modules of the rack."""
    if request.param == "modules":
        monkeypatch.setattr(decoder_module, "uncovered", lambda rack: "the test asks for the modules")
    return request.param


def decoded(rack: Rack, ids: Tensor, n_prompt: int, mask: Tensor | None = None) -> Tensor:
    """Logits at the last prompt token and after each later one, by the cache."""
    with torch.no_grad():
        decoder = Decoder(rack, ids.shape[0], ids.shape[1])
        steps = [decoder.read(ids[:, :n_prompt], None if mask is None else mask[:, :n_prompt])]
        steps += [decoder.step(ids[:, t]) for t in range(n_prompt, ids.shape[1])]
    return torch.stack(steps, dim=1)


ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 1, "qk_norm": True},
    {"n_kv_heads": 2, "bias": True, "norm": "layernorm"},
    {"n_kv_heads": 2, "head_width": 6, "attention_bias": "qkv"},
    {"use_rope": False, "norm": "layernorm", "ffn_type": "gelu", "qk_norm": True},
    {"tie_embeddings": False, "ffn_type": "relu2", "bias": True, "residual_gain": 0.5},
    {"norm": "rmsnorm_offset", "ffn_type": "geglu_tanh", "qk_norm": True, "score_width": 5.0},
    {"norm": "rmsnorm_offset", "score_width": 5.0, "short_conv": 2},
    {"short_conv": 3},
    {"short_conv": 2, "norm": "layernorm", "bias": True, "n_kv_heads": 2},
]


@pytest.mark.parametrize("options", ARCHITECTURES, ids=lambda options: ",".join(options) or "llama")
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_with_a_cache_is_the_full_forward_pass(
    options: dict[str, Any], rows: int, path: str
) -> None:
    rack = rack_of(**options)
    assert plan.uncovered(rack) is None
    ids = prompts(rows, 45)  # beyond the places a plan reserves at first
    with torch.no_grad():
        expected = rack(ids)[:, 3:]
    torch.testing.assert_close(decoded(rack, ids, 4), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", ARCHITECTURES, ids=lambda options: ",".join(options) or "llama")
def test_a_padded_batch_decodes_as_each_row_alone(options: dict[str, Any], path: str) -> None:
    rack = rack_of(**options)
    lengths = [2, 6, 9]
    ids, mask = left_padded(lengths, 9)
    ids = torch.cat((ids, prompts(3, 6, seed=2)), dim=1)
    batch = decoded(rack, ids, 9, mask)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = rack(ids[row : row + 1, 9 - length :])[:, length - 1 :]
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_plan_in_float64_is_exact_to_its_rounding() -> None:
    rack = rack_of(qk_norm=True, short_conv=2).double()
    ids = prompts(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(decoded(rack, ids, 5), rack(ids)[:, 4:], rtol=1e-12, atol=1e-12)


def test_greedy_generation_is_the_argmax_of_the_full_pass(path: str) -> None:
    rack = rack_of()
    ids = prompts(3, 5)
    out = generate(rack, ids, max_new_tokens=40, temperature=0.0)
    assert torch.equal(out[:, :5], ids)
    with torch.no_grad():
        assert torch.equal(out[:, 5:], rack(out)[:, 4:-1].argmax(-1))


def test_a_left_padded_batch_generates_what_each_prompt_does_alone(path: str) -> None:
    rack = rack_of(use_rope=False)  # learned positions notice every shift
    ids, mask = left_padded([1, 4, 7], 7)
    batch = generate(rack, ids, attention_mask=mask.long(), max_new_tokens=20, temperature=0.0)
    for row, length in enumerate([1, 4, 7]):
        alone = generate(rack, ids[row : row + 1, 7 - length :], max_new_tokens=20, temperature=0.0)
        assert torch.equal(batch[row, 7:], alone[0, length:])


def test_both_paths_choose_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "seed": 3,
        "slide": True,
    }
    ids, mask = left_padded([3, 5], 5)
    results = []
    for uncovered in (plan.uncovered, lambda rack: "the modules"):
        monkeypatch.setattr(decoder_module, "uncovered", uncovered)
        results.append(generate(rack_of(), ids, attention_mask=mask, max_new_tokens=90, **options))
    assert torch.equal(*results)


def test_seeds_decide_and_the_global_generator_plays_no_part() -> None:
    rack, ids = rack_of(), prompts(2, 4)
    torch.manual_seed(0)
    first = generate(rack, ids, max_new_tokens=20, seed=1)
    state = torch.get_rng_state()
    second = generate(rack, ids, max_new_tokens=20, seed=1)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, generate(rack, ids, max_new_tokens=20, seed=2))


def test_a_row_ends_with_its_stop_id_and_is_filled_while_others_go_on() -> None:
    rack, ids = rack_of(), prompts(3, 4)
    free = generate(rack, ids, max_new_tokens=30, temperature=0.0)[:, 4:]
    stop = int(free[0, 5])
    reached = [row.index(stop) if stop in row else 29 for row in free.tolist()]
    out = generate(rack, ids, max_new_tokens=30, temperature=0.0, stop_ids=[stop], pad_id=1)[:, 4:]
    assert out.shape[1] == max(reached) + 1
    for row, last in enumerate(reached):
        assert torch.equal(out[row, : last + 1], free[row, : last + 1])
        assert bool((out[row, last + 1 :] == 1).all())
    own = generate(rack, ids[:1], max_new_tokens=30, temperature=0.0, stop_ids=[stop])
    assert own[0, 4:].tolist() == free[0, : reached[0] + 1].tolist()


def test_without_a_pad_id_a_finished_row_repeats_its_stop_id() -> None:
    rack, ids = rack_of(), prompts(2, 4)
    free = generate(rack, ids, max_new_tokens=12, temperature=0.0)[:, 4:]
    stop = next(int(t) for t in free[0] if int(t) not in free[1].tolist())
    out = generate(rack, ids, max_new_tokens=12, temperature=0.0, stop_ids={stop})[0, 4:].tolist()
    assert set(out[out.index(stop) :]) == {stop}


def test_on_token_sees_every_column_and_ends_the_call() -> None:
    seen: list[Tensor] = []

    def on_token(ids: Tensor) -> bool:
        seen.append(ids.clone())
        return len(seen) == 3

    out = generate(rack_of(), prompts(2, 4), max_new_tokens=20, on_token=on_token)
    assert torch.equal(out[:, 4:], torch.stack(seen, dim=1))
    assert out.shape[1] == 7


def test_the_repetition_penalty_counts_the_prompt_but_not_its_padding() -> None:
    rack = rack_of()
    ids, mask = torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    options = {"max_new_tokens": 15, "temperature": 0.0, "repetition_penalty": 1e6}
    new = generate(rack, ids, attention_mask=mask, **options)[0, 4:].tolist()
    assert len(set(new)) == 15  # a penalty that forbids: no token comes twice,
    assert not {7, 8} & set(new)  # none of the prompt comes again,
    bare = generate(rack, ids[:, 2:], **options)[0, 2:].tolist()
    assert new == bare  # and the padding's id is not among them


def test_a_full_context_goes_on_with_its_newer_half(path: str) -> None:
    rack = rack_of(max_seq_len=8)
    out = generate(rack, prompts(2, 3), max_new_tokens=30, temperature=0.0, slide=True)
    held = 3
    for t in range(3, 33):
        if held > 8:
            held = 4
        with torch.no_grad():
            expected = rack(out[:, t - held : t])[:, -1].argmax(-1)
        assert torch.equal(out[:, t], expected)
        held += 1


def test_a_prompt_longer_than_the_context_is_read_from_its_end() -> None:
    rack, ids = rack_of(max_seq_len=8), prompts(1, 20)
    out = generate(rack, ids, max_new_tokens=1, temperature=0.0, slide=True)
    with torch.no_grad():
        assert int(out[0, -1]) == int(rack(ids[:, -8:])[0, -1].argmax())


def test_unequal_blocks_decode_as_the_full_pass() -> None:
    block = {"n_heads": 4, "causal": True}
    rack = create_rack_from_specs(
        V,
        16,
        [
            {"stack_id": 0, "n_blocks": 1, "block_spec": {**block, "n_kv_heads": 2, "d_ff": 24}},
            {"stack_id": 1, "n_blocks": 1, "block_spec": {**block, "n_heads": 2, "rope_theta": 500.0}},
            {"stack_id": 2, "n_blocks": 1, "block_spec": {**block, "rope_theta": None, "norm": "layernorm"}},
        ],
        max_seq_len=48,
    ).eval()
    assert plan.uncovered(rack) is None
    ids, mask = left_padded([20, 12], 20)
    with torch.no_grad():
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        expected = rack(ids, mask, position_ids=positions)
    torch.testing.assert_close(decoded(rack, ids, 10, mask), expected[:, 9:], rtol=1e-5, atol=1e-5)


class OwnFeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def make_own(rack: Rack) -> None:
    rack.blocks()[1].ffn.__class__ = OwnFeedForward


def make_hooked(rack: Rack) -> None:
    rack.blocks()[1].register_forward_hook(lambda module, args, output: output + 1)


def make_bfloat16(rack: Rack) -> None:
    rack.to(torch.bfloat16)


def make_foreign(rack: Rack) -> None:
    linear = rack.blocks()[0].attn.o
    rack.blocks()[0].attn.o = nn.Sequential(linear, nn.Tanh())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (make_own, "OwnFeedForward"),
        (make_hooked, "hook"),
        (make_bfloat16, "float32"),
        (make_foreign, "Sequential"),
    ],
)
def test_what_the_plan_does_not_cover_runs_through_the_modules(change: Any, reason: str) -> None:
    rack = rack_of(ffn_type="gelu")
    change(rack)
    assert reason in (plan.uncovered(rack) or "")
    out = generate(rack, prompts(2, 4), max_new_tokens=8, temperature=0.0)
    with torch.no_grad():
        full = rack(out)[:, 3:-1].float()
    chosen = full.gather(-1, out[:, 4:, None]).squeeze(-1)
    slack = 0.1 if rack.embedding.weight.dtype == torch.bfloat16 else 1e-4
    assert bool((full.amax(-1) - chosen <= slack).all())


def test_post_norm_and_large_racks_and_autocast_are_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    for placement in ("post", "both"):
        assert "after its sub-layers" in (plan.uncovered(rack_of(norm_placement=placement)) or "")
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in (plan.uncovered(rack_of()) or "")
    rack = rack_of()
    rack.runner = lambda index, block, x, context, cache: block(x, context, cache)
    assert "simply called" in (plan.uncovered(rack) or "")
    rack = rack_of()
    rack.stacks[0].compute_dtype = "bfloat16"
    assert "dtype of its own" in (plan.uncovered(rack) or "")
    monkeypatch.setattr(plan, "COPY_LIMIT", 1000)
    assert "1,000 bytes" in (plan.uncovered(rack_of()) or "")


def test_the_rack_is_left_as_it_was_also_by_an_error() -> None:
    rack = rack_of(dropout=0.1).train()
    rack.stacks[0].freeze_all()
    modes = [module.training for module in rack.modules()]

    def fail(ids: Tensor) -> None:
        assert not any(module.training for module in rack.modules())
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        generate(rack, prompts(1, 4), max_new_tokens=3, on_token=fail)
    generate(rack, prompts(1, 4), max_new_tokens=3)
    assert [module.training for module in rack.modules()] == modes
    assert all(parameter.grad is None for parameter in rack.parameters())


def test_a_rack_trains_on_what_it_generated() -> None:
    rack = rack_of().train()
    out = generate(rack, prompts(2, 4), max_new_tokens=6)
    rack(out).logsumexp(-1).sum().backward()
    assert rack.embedding.weight.grad is not None


def test_rack_generate_is_the_same_call() -> None:
    rack, ids = rack_of(), prompts(2, 4)
    assert torch.equal(
        rack.generate(ids, max_new_tokens=9, seed=4), generate(rack, ids, max_new_tokens=9, seed=4)
    )


ids = prompts(1, 4)
WRONG: list[tuple[type[Exception], str, Tensor, dict[str, Any]]] = [
    (ValueError, "max_new_tokens must be at least 1, got 0", ids, {"max_new_tokens": 0}),
    (ValueError, "temperature must be 0 .* got -1", ids, {"temperature": -1.0}),
    (ValueError, "temperature must be 0 .* got nan", ids, {"temperature": float("nan")}),
    (ValueError, "top_k must be 0 .* got -2", ids, {"top_k": -2}),
    (ValueError, "top_p must be above 0 and at most 1 .* got 0", ids, {"top_p": 0.0}),
    (ValueError, "repetition_penalty must be above 0 .* got 0", ids, {"repetition_penalty": 0.0}),
    (ValueError, "top_k must .*; top_p must", ids, {"top_k": -1, "top_p": 2.0}),
    (
        ValueError,
        "4 prompt tokens and 45 new ones are 49, more than max_seq_len = 48",
        ids,
        {"max_new_tokens": 45},
    ),
    (ValueError, r"attention_mask must be \[1, 4\]", ids, {"attention_mask": torch.ones(1, 5)}),
    (ValueError, "pad prompts on the left", ids, {"attention_mask": torch.tensor([[1, 1, 1, 0]])}),
    (ValueError, "at least one token", torch.zeros(1, 0, dtype=torch.long), {}),
    (TypeError, "integers", ids.float(), {}),
    (IndexError, "token id 23 is outside the vocabulary of 23", torch.tensor([[1, 23]]), {}),
]


@pytest.mark.parametrize(("error", "message", "given", "options"), WRONG, ids=lambda value: str(value)[:30])
def test_what_cannot_be_done_says_why(
    error: type[Exception], message: str, given: Tensor, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        generate(rack_of(), given, **{"max_new_tokens": 4, **options})


def test_a_bidirectional_rack_is_sent_to_the_other_call() -> None:
    rack = create_simple_rack(1, 1, 16, 24, 4, V, attention_preset="bert_style")
    with pytest.raises(ValueError, match="denoise"):
        generate(rack, ids)


def test_weights_that_are_no_numbers_are_named_and_not_sampled() -> None:
    rack = rack_of()
    with torch.no_grad():
        rack.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(rack, ids, max_new_tokens=3, temperature=0.0)


def test_a_full_decoder_takes_no_more(path: str) -> None:
    with torch.no_grad():
        decoder = Decoder(rack_of(), 1, 5)
        decoder.read(ids)
        decoder.step(ids[:, 0])
        assert decoder.full
        with pytest.raises(ValueError, match="5 tokens and is full"):
            decoder.step(ids[:, 0])


def test_normalised_embeddings_are_normalised_in_decoding_too(path: str) -> None:
    rack = Rack(replace(rack_of().spec, embedding_norm=True)).eval()
    given = prompts(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(decoded(rack, given, 4), rack(given)[:, 3:], rtol=1e-5, atol=1e-5)


def test_every_combination_of_the_parts_is_covered_alike() -> None:
    for kv, bias, rope, gated in itertools.product((1, 4), (False, True), (False, True), ("geglu", "silu")):
        rack = rack_of(1, n_kv_heads=kv, bias=bias, use_rope=rope, ffn_type=gated)
        given = prompts(2, 8)
        with torch.no_grad():
            expected = rack(given)[:, 2:]
        torch.testing.assert_close(decoded(rack, given, 3), expected, rtol=1e-5, atol=1e-5)


class Remembering(FeedForward):
    """Caches a tensor on first use, as modules do with masks or tables."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = torch.full((1,), 2.0)
        return self.scale * super().forward(x)


def test_what_a_module_caches_while_generating_still_serves_training() -> None:
    rack = rack_of(ffn_type="gelu")
    rack.blocks()[0].ffn.__class__ = Remembering
    generate(rack, prompts(1, 4), max_new_tokens=3)
    rack.train()(prompts(1, 4)).logsumexp(-1).sum().backward()
