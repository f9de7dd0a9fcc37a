"""Perplexity: exact, weighted by tokens, and independent of how rows are batched."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stackwise.data.corpus import TokenSplit
from stackwise.data.errors import DataError
from stackwise.data.loader import EvalLoader
from stackwise.evaluation.perplexity import perplexity
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.training.validate import bits_per_byte, validate

V, N = 17, 500


def rack_of(**options: Any) -> Rack:
    options = {"attention_preset": "gpt_style", "max_seq_len": 32, **options}
    return create_simple_rack(2, 1, 16, 24, 2, V, **options)


@pytest.fixture
def split() -> TokenSplit:
    tokens = np.random.default_rng(0).integers(0, V, N)
    return TokenSplit.from_arrays(
        tokens, doc_starts=[0, 37, 40, 41, 200, 333], n_bytes=1234, name="validation"
    )


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(split: TokenSplit) -> None:
    rack = rack_of(tie_embeddings=False)
    with torch.no_grad():
        rack.head.weight.zero_()
    result = perplexity(rack, split, seq_len=16)
    assert result.perplexity == pytest.approx(V, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(V) * N / 1234, rel=1e-6)
    assert result.label == "exact"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("doc_mask", [True, False])
def test_it_does_not_depend_on_the_batch_size(split: TokenSplit, packing: bool, doc_mask: bool) -> None:
    rack = rack_of()
    results = [
        perplexity(rack, split, seq_len=16, batch_size=size, packing=packing, doc_mask=doc_mask)
        for size in (1, 3, 7, 16)
    ]
    assert len({result.tokens for result in results}) == 1
    for result in results[1:]:
        assert result.nats_per_token == pytest.approx(results[0].nats_per_token, abs=1e-6)
        assert result.perplexity == pytest.approx(results[0].perplexity, rel=1e-6)


def test_the_same_call_gives_the_same_figure(split: TokenSplit) -> None:
    rack = rack_of(dropout=0.2).train()
    assert perplexity(rack, split, seq_len=16) == perplexity(rack, split, seq_len=16)


def test_it_is_the_mean_over_all_windows_by_hand(split: TokenSplit) -> None:
    rack, T = rack_of().double().eval(), 16
    tokens = torch.tensor(split.tokens.astype(np.int64))
    total, count = 0.0, 0
    for start in range(0, (N - 1) // T * T, T):
        with torch.no_grad():
            logits = rack(tokens[None, start : start + T])[0]
        total += float(F.cross_entropy(logits, tokens[start + 1 : start + T + 1], reduction="sum"))
        count += T
    result = perplexity(rack, split, seq_len=T, doc_mask=False, batch_size=5)
    assert (result.tokens, result.windows) == (count, (N - 1) // T)
    assert result.nats_per_token == pytest.approx(total / count, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(total / count * N / 1234 / math.log(2), rel=1e-12)


def test_documents_are_scored_as_if_each_stood_alone() -> None:
    rack = rack_of().double()
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]]
    tokens = [token for document in documents for token in document]
    split = TokenSplit.from_arrays(tokens, doc_starts=[0, 5, 7])
    packed = perplexity(rack, split, seq_len=15)
    alone = perplexity(rack, split, seq_len=15, packing=False)
    assert packed.tokens == alone.tokens == 4 + 1 + 8
    assert packed.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-12)
    assert packed.bits_per_byte is None  # this split does not know its bytes


def test_part_of_the_split_is_a_choice(split: TokenSplit) -> None:
    result = perplexity(rack_of(), split, seq_len=16, batch_size=3, batches=2)
    assert result.windows == 6


def test_the_chunk_of_the_head_changes_nothing(split: TokenSplit) -> None:
    rack = rack_of().double()
    values = [
        perplexity(rack, split, seq_len=16, rows_per_chunk=rows).nats_per_token for rows in (1, 7, None)
    ]
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-12)


def test_bfloat16_is_near_float32(split: TokenSplit) -> None:
    exact = perplexity(rack_of(), split, seq_len=16)
    rough = perplexity(rack_of(), split, seq_len=16, dtype=torch.bfloat16)
    assert rough.nats_per_token == pytest.approx(exact.nats_per_token, rel=1e-2)


def test_a_hopeless_model_is_infinite_and_not_an_overflow(split: TokenSplit) -> None:
    rack = rack_of(tie_embeddings=False)
    with torch.no_grad():
        rack.head.weight.mul_(1e7)
    assert perplexity(rack, split, seq_len=16).perplexity == math.inf


def test_the_result_is_json_able(split: TokenSplit) -> None:
    data = json.loads(json.dumps(perplexity(rack_of(), split, seq_len=16).to_dict()))
    assert set(data) == {
        "nats_per_token",
        "perplexity",
        "bits_per_byte",
        "tokens",
        "windows",
        "seq_len",
        "stride",
        "label",
    }


def test_what_cannot_be_evaluated_says_why(split: TokenSplit) -> None:
    with pytest.raises(ValueError, match="causal"):
        perplexity(rack_of(attention_preset="bert_style"), split, seq_len=16)
    with pytest.raises(ValueError, match="64 tokens are longer than the model's max_seq_len = 32"):
        perplexity(rack_of(), split, seq_len=64)
    with pytest.raises(DataError, match="outside a vocabulary of 17"):
        perplexity(rack_of(), TokenSplit.from_arrays([1, 99, 2, 3]), seq_len=2)
    with pytest.raises(DataError, match="a row needs 17"):
        perplexity(rack_of(), TokenSplit.from_arrays([1, 2, 3]), seq_len=16)


def test_validation_leaves_the_rack_as_it_was(split: TokenSplit) -> None:
    rack = rack_of(dropout=0.1).train()
    rack.stacks[0].freeze_all()
    modes = [module.training for module in rack.modules()]
    before = {name: tensor.clone() for name, tensor in rack.state_dict().items()}
    loader = EvalLoader(split, seq_len=16, batch_size=4)
    validate(rack, loader)
    with pytest.raises(KeyError):
        validate(rack, [{"tokens": torch.zeros(1, 4)}])
    assert [module.training for module in rack.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in rack.state_dict().items())
    assert all(parameter.grad is None for parameter in rack.parameters())


def test_nothing_to_validate_on_is_an_error() -> None:
    batch = {"input_ids": torch.tensor([[3]])}
    for batches in ([], [batch]):
        with pytest.raises(ValueError, match="nothing to validate on"):
            validate(rack_of(), batches)


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(math.log(2), 100, 50) == pytest.approx(2.0)
    assert bits_per_byte(1.0, 100, 0) is None


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_with_a_stride_every_token_is_scored_once_and_with_enough_before_it(
    split: TokenSplit, stride: int
) -> None:
    rack, T = rack_of().double().eval(), 16
    tokens = torch.tensor(split.tokens.astype(np.int64))
    edges = set(split.doc_starts.tolist())
    total, count = 0.0, 0
    for target in range(1, N):
        if target in edges:
            continue
        # the window that scores it: the first that holds it, where the last one ends with the text
        step = max(0, -(-(target - T) // stride))
        start = min(step * stride, N - 1 - T)
        document = max(edge for edge in edges if edge < target)
        with torch.no_grad():
            logits = rack(tokens[None, max(start, document) : target])[0, -1]
        total += float(F.cross_entropy(logits, tokens[target]))
        count += 1
    result = perplexity(rack, split, seq_len=T, stride=stride, batch_size=7)
    assert (result.tokens, result.stride) == (count, stride)
    assert result.nats_per_token == pytest.approx(total / count, rel=1e-10)
    apart = perplexity(rack, split, seq_len=T, stride=stride, packing=False, doc_mask=False, batch_size=3)
    assert apart.nats_per_token == pytest.approx(result.nats_per_token, rel=1e-10)


def test_a_text_shorter_than_a_window_is_one_shorter_window() -> None:
    rack, tokens = rack_of().double().eval(), torch.tensor([3, 1, 4, 1, 5])
    result = perplexity(rack, TokenSplit.from_arrays(tokens), seq_len=16, stride=16)
    with torch.no_grad():
        wanted = F.cross_entropy(rack(tokens[None, :-1])[0], tokens[1:])
    assert (result.tokens, result.windows) == (4, 1)
    assert result.nats_per_token == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_leaves_nothing_out(split: TokenSplit, stride: int) -> None:
    with pytest.raises(ValueError, match="must be 1 to seq_len = 16"):
        perplexity(rack_of(), split, seq_len=16, stride=stride)


def test_progress_hears_of_every_batch(split: TokenSplit) -> None:
    heard: list[tuple[int, int]] = []
    result = perplexity(
        rack_of(), split, seq_len=16, batch_size=7, progress=lambda done, total: heard.append((done, total))
    )
    assert heard == [(n, 5) for n in range(1, 6)]
    assert result == perplexity(rack_of(), split, seq_len=16, batch_size=7)
