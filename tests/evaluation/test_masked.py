"""Masked loss and accuracy, and pseudo-perplexity: by hand, and independent of how rows are batched."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise.data.corpus import TokenSplit
from stackwise.evaluation.masked import HIDDEN_TOKENS, masked_scores, pseudo_perplexity
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import Denoiser
from stackwise.objectives.intervals import Intervals
from stackwise.objectives.masked import MaskedLM, Vocabulary

V, MASK, N, T = 17, 16, 520, 16


def rack_of(n_stacks: int = 2, **options: Any) -> Rack:
    rack = create_simple_rack(
        n_stacks, 1, 16, 24, 2, V, **{"attention_preset": "bert_style", "max_seq_len": 32, **options}
    )
    with torch.no_grad():
        rack.head.matrix.mul_(8)
    return rack


def objective_of(corruption: str = "bert", **options: Any) -> MaskedLM:
    return MaskedLM(Vocabulary(V, MASK, (3,)), seed=5, corruption=corruption, **options)


@pytest.fixture
def split() -> TokenSplit:
    tokens = np.random.default_rng(0).integers(0, MASK, N)
    return TokenSplit.from_arrays(tokens, doc_starts=[0, 37, 40, 41, 200, 333], n_bytes=1234)


class Echo(Denoiser):
    """Guesses what stands in the input, 30 times as likely as anything else."""

    def hidden(self, input_ids: Tensor, **others: Any) -> Tensor:
        return F.one_hot(input_ids, V + 1).float() * math.log(30)


def echo() -> Echo:
    rack = create_simple_rack(1, 1, V + 1, 8, 1, V, max_seq_len=32, tie_embeddings=False)
    with torch.no_grad():
        rack.head.matrix.copy_(torch.eye(V, V + 1))
    return Echo(rack, MASK)


# --- masked scores ---------------------------------------------------------------------------------------------


def test_an_echo_is_right_about_kept_tokens_alone(split: TokenSplit) -> None:
    """16 possible answers. Kept: right. Random: wrong. Masked: a guess, of which the first id is taken."""
    result = masked_scores(echo(), objective_of(bert=(0.0, 0.0, 1.0)), split, seq_len=T)
    assert (result.accuracy, result.label) == (1.0, "pseudo")
    assert result.nats_per_masked_token == pytest.approx(math.log(45 / 30), rel=1e-5)
    hidden = masked_scores(echo(), objective_of("absorbing"), split, seq_len=T)
    assert hidden.nats_per_masked_token == pytest.approx(math.log(V - 1), rel=1e-5)
    random = masked_scores(echo(), objective_of(bert=(0.0, 1.0, 0.0)), split, seq_len=T, passes=20)
    assert random.accuracy < 0.15  # a random token may be the same


@pytest.mark.parametrize("corruption", ["bert", "absorbing"])
def test_it_is_the_mean_over_all_corrupted_tokens_by_hand(split: TokenSplit, corruption: str) -> None:
    rack, objective = rack_of(), objective_of(corruption)
    result = masked_scores(Denoiser(rack, MASK), objective, split, seq_len=T, doc_mask=False, passes=2)
    windows = torch.tensor(split.tokens.astype(np.int64))[: (N - 1) // T * T].view(-1, T)
    places = torch.arange(len(windows))
    nats, right, count, ordinary = 0.0, 0, 0, 0
    for number in range(2):
        batch = {"input_ids": windows, "sample_ids": places, "places": places, "draws": places * 0 + number}
        example = objective.for_evaluation().corrupt(batch)
        with torch.no_grad():
            logits = rack(example.input_ids)
        logits[..., MASK] = -torch.inf
        scored = example.labels >= 0
        nats += float(F.cross_entropy(logits[scored], example.labels[scored], reduction="sum"))
        right += int((logits.argmax(-1) == example.labels)[scored].sum())
        count += int(scored.sum())
        ordinary += int((windows != 3).sum())
    assert (result.tokens, result.accuracy, result.share) == (count, right / count, count / ordinary)
    assert result.nats_per_masked_token == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_scores_do_not_depend_on_the_batch_size(split: TokenSplit, packing: bool) -> None:
    denoiser = Denoiser(rack_of(), MASK, intervals=Intervals.linear(2), path="suffix")
    results = [
        masked_scores(
            denoiser,
            objective_of("absorbing"),
            split,
            seq_len=T,
            batch_size=b,
            packing=packing,
            noise=(0.0, 1.0),
        )
        for b in (1, 5, 64)
    ]
    for result in results[1:]:
        assert result.nats_per_masked_token == pytest.approx(results[0].nats_per_masked_token, abs=1e-6)
        assert (result.accuracy, result.tokens) == (results[0].accuracy, results[0].tokens)


def test_the_share_is_that_of_training_or_the_one_asked_for(split: TokenSplit) -> None:
    denoiser = Denoiser(rack_of(), MASK)
    own = masked_scores(denoiser, objective_of(fraction=0.25), split, seq_len=T)
    asked = masked_scores(denoiser, objective_of(), split, seq_len=T, noise=(0.5, 0.5))
    assert own.share == pytest.approx(0.25, abs=0.02)
    assert asked.share == pytest.approx(0.5, abs=0.02)


def test_scores_have_an_error_and_are_json_able(split: TokenSplit) -> None:
    denoiser = Denoiser(rack_of(dropout=0.2).train(), MASK)
    many = masked_scores(denoiser, objective_of(), split, seq_len=T, passes=8)
    assert many == masked_scores(denoiser, objective_of(), split, seq_len=T, passes=8)
    assert many.standard_error is not None
    assert 0 < many.standard_error < 1
    assert masked_scores(denoiser, objective_of(), split, seq_len=T, passes=1).standard_error is None
    assert json.loads(json.dumps(many.to_dict()))["label"] == "pseudo"


# --- pseudo-perplexity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
def test_every_token_is_hidden_alone_and_guessed_from_the_others(split: TokenSplit, shifted: bool) -> None:
    rack = rack_of()
    denoiser = Denoiser(rack, MASK, shifted=shifted)
    result = pseudo_perplexity(
        denoiser, split, seq_len=T, windows=3, special_ids=[3], doc_mask=False, batch_size=7
    )
    rows = torch.tensor(split.tokens.astype(np.int64))[: (N - 1) // T * T].view(-1, T)
    losses = []
    for row in rows[np.arange(3) * len(rows) // 3]:
        for i in range(T):
            if row[i] == 3 or (shifted and i == 0):
                continue
            hidden = row.clone()
            hidden[i] = MASK
            with torch.no_grad():
                logits = rack(hidden[None])[0, i - shifted]
            logits[MASK] = -torch.inf
            losses.append(float(F.cross_entropy(logits, row[i])))
    assert (result.tokens, result.windows, result.label) == (len(losses), 3, "pseudo")
    assert result.nats_per_token == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.pseudo_perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_pseudo_perplexity_does_not_depend_on_the_batch_size(split: TokenSplit, packing: bool) -> None:
    denoiser = Denoiser(rack_of(), MASK, intervals=Intervals.exponential(2, 0.15), path="alone")
    values = [
        pseudo_perplexity(denoiser, split, seq_len=T, windows=4, batch_size=b, packing=packing).nats_per_token
        for b in (1, 6, 50)
    ]
    assert values[1:] == pytest.approx(values[:1] * 2, abs=1e-6)


def test_of_a_uniform_model_it_is_the_number_of_answers(split: TokenSplit) -> None:
    rack = rack_of(tie_embeddings=False)
    with torch.no_grad():
        rack.head.weight.zero_()
    result = pseudo_perplexity(Denoiser(rack, MASK), split, seq_len=T, windows=2)
    assert result.pseudo_perplexity == pytest.approx(V - 1, rel=1e-5)


def test_the_work_is_capped(split: TokenSplit) -> None:
    long = TokenSplit.from_arrays(np.tile(split.tokens, 20))
    rack = create_simple_rack(1, 1, 4, 4, 1, V, max_seq_len=64)
    assert pseudo_perplexity(Denoiser(rack, MASK), long, seq_len=64, batch_size=64).tokens == HIDDEN_TOKENS


def test_rows_are_judged_by_the_stack_that_owns_their_share(split: TokenSplit) -> None:
    """The stack next to the head owns light noise, the other one heavy noise."""
    denoiser = Denoiser(rack_of(), MASK, intervals=Intervals.linear(2), path="alone")

    def figures() -> list[float]:
        scores = [
            masked_scores(denoiser, objective_of("absorbing"), split, seq_len=T, noise=(share, share))
            for share in (0.25, 0.75)
        ]
        alone = pseudo_perplexity(denoiser, split, seq_len=T, windows=2)
        return [*(s.nats_per_masked_token for s in scores), alone.nats_per_token]

    before = figures()
    with torch.no_grad():
        for parameter in denoiser.rack.stacks[0].parameters():
            parameter.add_(torch.randn_like(parameter))
    changed = [abs(a - b) > 1e-4 for a, b in zip(figures(), before, strict=True)]
    assert changed == [False, True, False]


# --- wrong use -------------------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated_says_why(split: TokenSplit) -> None:
    denoiser = Denoiser(rack_of(), MASK)
    with pytest.raises(ValueError, match="gaussian corruption adds noise"):
        masked_scores(denoiser, objective_of("gaussian"), split, seq_len=T)
    with pytest.raises(ValueError, match="max_seq_len = 32"):
        pseudo_perplexity(denoiser, split, seq_len=64)
    nothing = TokenSplit.from_arrays([3] * 20)
    with pytest.raises(ValueError, match="every token of the split is special or padding"):
        masked_scores(denoiser, objective_of(), nothing, seq_len=T)
    with pytest.raises(ValueError, match="every token of these windows is special or padding"):
        pseudo_perplexity(denoiser, nothing, seq_len=T, special_ids=[3])
