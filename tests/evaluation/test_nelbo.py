"""The likelihood bound: exact where the answer is known, the same by both estimators, in parts that add up."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.config.objective_rules import label_of
from stackwise.config.root import StackWiseConfig
from stackwise.data.corpus import TokenSplit
from stackwise.data.errors import DataError
from stackwise.evaluation.masked import masked_scores
from stackwise.evaluation.nelbo import QUARTERS, ByCount, Nelbo, nelbo
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.objectives.base import IGNORE
from stackwise.objectives.denoiser import Denoiser, denoiser_of
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.intervals import Intervals
from stackwise.objectives.masked import Vocabulary

V, MASK, N, T = 17, 16, 520, 16


def rack_of(n_stacks: int = 2, **options: Any) -> Rack:
    rack = create_simple_rack(
        n_stacks, 1, 16, 24, 2, V, **{"attention_preset": "bert_style", "max_seq_len": 32, **options}
    )
    with torch.no_grad():  # as initialised, all tokens are nearly equally likely
        rack.head.matrix.mul_(8)
    return rack


@pytest.fixture
def split() -> TokenSplit:
    tokens = np.random.default_rng(0).integers(0, MASK, N)
    return TokenSplit.from_arrays(tokens, doc_starts=[0, 37, 40, 41, 200, 333], n_bytes=1234)


# --- known answers ---------------------------------------------------------------------------------------------


class Knowing(Denoiser):
    """Knows texts [K, T] and their probabilities [K]: log p(token | what is visible), by enumeration."""

    def __init__(self, texts: Tensor, chances: Tensor, size: int) -> None:
        rack = create_simple_rack(1, 1, size, 8, 1, size, max_seq_len=texts.shape[1], tie_embeddings=False)
        with torch.no_grad():
            rack.head.matrix.copy_(torch.eye(size))  # hidden states are the logits
        super().__init__(rack, size - 1)
        self.chances = chances
        self.texts = torch.nn.functional.one_hot(texts, size).double()

    def hidden(self, input_ids: Tensor, **others: Any) -> Tensor:
        size = self.texts.shape[2]
        seen = torch.nn.functional.one_hot(input_ids, size).double()
        hidden = (input_ids == self.mask_id)[:, None, :]
        fits = ((self.texts * seen[:, None]).sum(-1).bool() | hidden).all(-1)
        states = torch.einsum("bk,ktv->btv", fits * self.chances, self.texts)
        return (states / states.sum(-1, keepdim=True)).log().clamp_min(-1e30).float()


def markov(size: int, length: int) -> tuple[Tensor, Tensor]:
    """All texts [K, T] of a random chain with memory 1, and their probabilities [K]."""
    start = torch.rand(size, dtype=torch.float64) + 0.1
    step = torch.rand(size, size, dtype=torch.float64) ** 3 + 0.01
    start, step = start / start.sum(), step / step.sum(1, keepdim=True)
    texts = torch.tensor(list(product(range(size), repeat=length)))
    return texts, start[texts[:, 0]] * step[texts[:, :-1], texts[:, 1:]].prod(1)


def rows_of(texts: Tensor) -> TokenSplit:
    """A split whose windows are the texts [K, T]."""
    return TokenSplit.from_arrays([*texts.flatten().tolist(), 0], n_bytes=7)


def test_of_a_model_that_knows_all_conditionals_it_is_the_entropy() -> None:
    """With the true conditionals every order of uncovering costs -log p(text), so the bound is tight on average."""
    length, size = 4, 3
    texts, chances = markov(size, length)
    chosen = torch.multinomial(chances, 4000, replacement=True)
    sample = rows_of(texts[chosen])
    result = nelbo(Knowing(texts, chances, size + 1), sample, seq_len=length, batch_size=500, passes=16)
    exact = -float(chances[chosen].log().mean()) / length
    assert result.standard_error is not None
    assert 0 < result.standard_error < 0.01
    assert result.nats_per_token == pytest.approx(exact, abs=4 * result.standard_error)
    assert exact == pytest.approx(-float((chances * chances.log()).sum()) / length, abs=0.05)


def test_the_count_form_is_the_sum_over_all_subsets() -> None:
    """Tiny enough to list every mask: 4 tokens of a vocabulary of 5."""
    length, size = 4, 6
    rack = create_simple_rack(1, 1, 8, 8, 2, size, max_seq_len=length)
    with torch.no_grad():
        rack.head.matrix.mul_(20)
    denoiser, text = Denoiser(rack, 5), torch.tensor([[3, 0, 4, 1]])
    exact = 0.0
    for n in range(1, length + 1):
        for hidden in combinations(range(length), n):
            at = torch.tensor(hidden)
            ids = text.clone()
            ids[0, at] = 5
            with torch.no_grad():
                logp = denoiser.logits(ids, at).log_softmax(-1)
            loss = -logp[torch.arange(n), text[0, at]].mean()
            exact += float(loss) / math.comb(length, n) / length
    split = rows_of(text.expand(2000, -1))
    for estimator in ("count", "t"):
        result = nelbo(denoiser, split, seq_len=length, batch_size=1000, passes=24, estimator=estimator)
        assert result.standard_error is not None
        assert result.nats_per_token == pytest.approx(exact, abs=4 * result.standard_error)
        assert result.standard_error < 0.02 * exact


@pytest.mark.parametrize("estimator", ["count", "t"])
def test_of_a_uniform_model_it_is_log_v(split: TokenSplit, estimator: str) -> None:
    rack = rack_of(tie_embeddings=False)
    with torch.no_grad():
        rack.head.weight.zero_()
    result = nelbo(Denoiser(rack, MASK), split, seq_len=T, estimator=estimator)
    by_mask = [part.masked_loss for part in result.parts]
    assert by_mask == pytest.approx([math.log(V - 1)] * 4, rel=1e-6)  # the mask token is never an answer
    if estimator == "count":
        assert result.nats_per_token == pytest.approx(math.log(V - 1), rel=1e-6)
        assert result.perplexity == pytest.approx(V - 1, rel=1e-5)
        assert result.bits_per_byte == pytest.approx(math.log2(V - 1) * N / 1234, rel=1e-6)


def test_the_two_estimators_agree(split: TokenSplit) -> None:
    denoiser = Denoiser(rack_of(), MASK)
    by_count, by_time = (
        nelbo(denoiser, split, seq_len=T, batch_size=32, passes=24, estimator=estimator)
        for estimator in ("count", "t")
    )
    assert by_count.standard_error is not None
    assert by_time.standard_error is not None
    error = math.hypot(by_count.standard_error, by_time.standard_error)
    assert abs(by_count.nats_per_token - by_time.nats_per_token) < 3 * error
    assert error < 0.05 * by_count.nats_per_token


# --- the protocol ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("even", [True, False])
def test_every_count_comes_up_equally_often_and_exactly(even: bool) -> None:
    """32 windows of 16: in each pass every count stands twice, at other windows and positions each time."""
    objective = ByCount(
        Vocabulary(V, MASK), seed=1234, corruption="absorbing", windows=32, seq_len=T, even=even
    )
    ids, places = torch.randint(0, MASK, (32, T)), torch.arange(32)
    found = []
    for number in range(2):
        batch = {"input_ids": ids, "draws": torch.full((32,), number), "places": places}
        example = objective.corrupt(batch)
        assert sorted((example.labels != IGNORE).sum(1).tolist()) == sorted([*range(1, T + 1)] * 2)
        assert torch.equal(example.input_ids == MASK, example.labels != IGNORE)
        found.append(example.labels)
    assert not torch.equal(found[0], found[1])
    generator = torch.Generator().manual_seed(1234)
    if not even:
        counts = 1 + torch.randperm(32, generator=generator) % T
        assert torch.equal((found[0] != IGNORE).sum(1), counts)
    with pytest.raises(ValueError, match="pass 3 after pass 1"):
        objective.corrupt({"input_ids": ids, "draws": torch.full((32,), 3), "places": places})


@pytest.mark.parametrize("n_windows", [3, 11, 24])
def test_no_count_is_favoured_however_many_windows_there_are(n_windows: int) -> None:
    """Rows of 16 tokens of which some have 5: over many passes all counts of each come up alike."""
    vocabulary = Vocabulary(V, MASK, (3,))
    objective = ByCount(vocabulary, seed=7, corruption="absorbing", windows=n_windows, seq_len=T)
    ids, places = torch.zeros(n_windows, T, dtype=torch.long), torch.arange(n_windows)
    ids[::2, 5:] = 3
    batch = {"input_ids": ids, "places": places}
    examples = [
        objective.corrupt({**batch, "draws": torch.full((n_windows,), number)}) for number in range(600)
    ]
    counts = torch.stack([(example.labels != IGNORE).sum(1) for example in examples])
    for rows, most in ((counts[:, ::2], 5), (counts[:, 1::2], T)):
        shares = torch.bincount(rows.flatten(), minlength=most + 1)[1:] / rows.numel()
        assert len(shares) == most
        error = (1 / most / rows.numel()) ** 0.5
        assert shares.tolist() == pytest.approx([1 / most] * most, abs=5 * error)


@pytest.mark.parametrize("estimator", ["count", "t"])
@pytest.mark.parametrize("packing", [True, False])
def test_it_does_not_depend_on_the_batch_size(split: TokenSplit, packing: bool, estimator: str) -> None:
    denoiser = Denoiser(rack_of(), MASK, intervals=Intervals.linear(2), path="suffix")
    results = [
        nelbo(
            denoiser,
            split,
            seq_len=T,
            batch_size=size,
            packing=packing,
            passes=2,
            special_ids=[3],
            estimator=estimator,
        )
        for size in (1, 5, 64)
    ]
    for result in results[1:]:
        assert result.nats_per_token == pytest.approx(results[0].nats_per_token, abs=1e-6)
        for mine, first in zip(result.parts, results[0].parts, strict=True):
            assert mine.nats_per_token == pytest.approx(first.nats_per_token, abs=1e-6)
            assert mine.width == pytest.approx(first.width, abs=1e-12)


def test_the_same_call_gives_the_same_figure_and_leaves_the_rack_as_it_was(split: TokenSplit) -> None:
    denoiser = Denoiser(rack_of(dropout=0.3).train(), MASK)
    assert nelbo(denoiser, split, seq_len=T) == nelbo(denoiser, split, seq_len=T)
    assert all(module.training for module in denoiser.rack.modules())
    assert all(parameter.grad is None for parameter in denoiser.rack.parameters())


# --- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [None, [0.2, 0.5, 0.9]])
def test_stacks_that_learned_single_shares_have_no_bound(
    split: TokenSplit, points: list[float] | None
) -> None:
    config = StackWiseConfig.from_dict(
        {
            "model": {"attention_preset": "bert_style", "vocab_size": V, "architecture": {"n_stacks": 3}},
            "objective": {"mask_token_id": MASK},
            "training": {
                "progressive": {
                    "building_mode": "independent",
                    "training_objective": "diffusion",
                    "time_step_mask_fractions": points,
                }
            },
        }
    )
    denoiser = denoiser_of(rack_of(3), config)
    if points is None:
        assert nelbo(denoiser, split, seq_len=T).label == label_of(config) == "bound"
        return
    assert label_of(config) == "pseudo"
    with pytest.raises(ValueError, match=r"each stack learned a single one .*time_step_mask_fractions"):
        nelbo(denoiser, split, seq_len=T)
    objective = Diffusion(Vocabulary(V, MASK), 1, "absorbing")
    for share in points:
        scores = masked_scores(denoiser, objective, split, seq_len=T, noise=(share, share))
        assert scores.label == "pseudo"
        assert scores.share == pytest.approx(share, abs=0.5 / T)


@pytest.mark.parametrize("estimator", ["count", "t"])
@pytest.mark.parametrize(
    "intervals", [None, Intervals.linear(3), Intervals.exponential(3, 0.15), Intervals((0, 0.01, 0.5, 1))]
)
def test_the_parts_add_to_the_total(split: TokenSplit, intervals: Intervals | None, estimator: str) -> None:
    path = "rack" if intervals is None else "alone"
    denoiser = Denoiser(rack_of(3), MASK, intervals=intervals, path=path)
    result = nelbo(denoiser, split, seq_len=T, batch_size=32, estimator=estimator)
    assert sum(part.nats_per_token for part in result.parts) == pytest.approx(result.nats_per_token, rel=1e-9)
    bounds = (intervals or QUARTERS).boundaries
    assert [(part.low, part.high) for part in result.parts] == list(pairwise(bounds))
    for part in result.parts:
        if part.masked_loss is None:
            assert part.nats_per_token == part.width == 0
        else:
            assert part.masked_loss * part.width == pytest.approx(part.nats_per_token, rel=1e-9)
    if estimator == "count" and intervals is None:
        assert [part.width for part in result.parts] == pytest.approx([0.25] * 4, rel=1e-6)


def test_each_count_is_judged_by_the_stack_that_owns_it(split: TokenSplit) -> None:
    """Once a stack is broken, its own interval changes and no other."""
    denoiser = Denoiser(rack_of(3), MASK, intervals=Intervals.linear(3), path="alone")
    before = nelbo(denoiser, split, seq_len=T, batch_size=32)
    with torch.no_grad():
        for parameter in denoiser.rack.stacks[0].parameters():
            parameter.add_(torch.randn_like(parameter))
    after = nelbo(denoiser, split, seq_len=T, batch_size=32)
    changed = [
        abs(a.nats_per_token - b.nats_per_token) > 1e-6
        for a, b in zip(before.parts, after.parts, strict=True)
    ]
    assert changed == [False, False, True]  # the stack next to the embedding owns the heaviest noise


# --- what is scored --------------------------------------------------------------------------------------------


def test_special_tokens_and_padding_are_not_scored() -> None:
    """Documents of 5, 2 and 9 tokens, one of them special, as rows of 9: what stands in the padding is no matter."""
    documents = [[1, 2, 3, 4, 5], [6, 15], [8, 9, 10, 11, 12, 13, 14, 1, 2]]
    tokens = [token for document in documents for token in document]
    split = TokenSplit.from_arrays(tokens, doc_starts=[0, 5, 7], n_bytes=40)
    denoiser = Denoiser(rack_of().double(), MASK)
    results = [
        nelbo(denoiser, split, seq_len=9, packing=False, pad_id=pad, special_ids=[15]) for pad in (0, 7)
    ]
    assert results[0] == results[1]
    assert results[0].tokens == 15
    expected = results[0].nats_per_token * 15 / 40 / math.log(2)
    assert results[0].bits_per_byte == pytest.approx(expected, rel=1e-12)


def test_a_shifted_model_is_never_asked_for_the_first_token_of_a_row(split: TokenSplit) -> None:
    result = nelbo(Denoiser(rack_of(), MASK, shifted=True), split, seq_len=T, doc_mask=False)
    assert result.tokens == (N - 1) // T * (T - 1)


def test_the_share_that_a_row_is_judged_by_is_the_one_that_is_masked(split: TokenSplit) -> None:
    asked = []

    class Listening(Denoiser):
        def hidden(self, input_ids: Tensor, *, shares: Tensor | None = None, **others: Any) -> Tensor:
            assert shares is not None
            asked.append((shares, (input_ids == MASK).double().mean(1)))
            return super().hidden(input_ids, shares=shares, **others)

    nelbo(Listening(rack_of(), MASK), split, seq_len=T, doc_mask=False, passes=1)
    for told, real in asked:
        assert torch.equal(told, real)


# --- the result ------------------------------------------------------------------------------------------------


def test_the_result_is_json_able_and_says_what_it_is(split: TokenSplit) -> None:
    result = nelbo(Denoiser(rack_of(), MASK), split, seq_len=T, batch_size=3, batches=2, passes=1)
    assert isinstance(result, Nelbo)
    assert (result.label, result.estimator, result.windows, result.standard_error) == (
        "bound",
        "count",
        6,
        None,
    )
    data = json.loads(json.dumps(result.to_dict()))
    assert [set(part) for part in data["parts"]] == [
        {"low", "high", "nats_per_token", "width", "masked_loss"}
    ] * 4


def test_progress_hears_of_every_batch_of_every_pass(split: TokenSplit) -> None:
    heard: list[tuple[int, int]] = []
    nelbo(
        Denoiser(rack_of(), MASK),
        split,
        seq_len=T,
        batch_size=3,
        batches=2,
        passes=3,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(n, 6) for n in range(1, 7)]


def test_the_error_is_that_of_the_mean_over_passes(split: TokenSplit) -> None:
    denoiser = Denoiser(rack_of(), MASK)
    one, two, both = (nelbo(denoiser, split, seq_len=T, passes=k) for k in (1, 2, 2))
    second = 2 * two.nats_per_token - one.nats_per_token
    assert both.standard_error == pytest.approx(abs(one.nats_per_token - second) / 2, rel=1e-6)


def test_what_cannot_be_evaluated_says_why(split: TokenSplit) -> None:
    denoiser = Denoiser(rack_of(), MASK)
    with pytest.raises(ValueError, match="unknown estimator 'x'; allowed: count, t"):
        nelbo(denoiser, split, seq_len=T, estimator="x")
    with pytest.raises(ValueError, match="unknown counts 'x'; allowed: even, modulo"):
        nelbo(denoiser, split, seq_len=T, counts="x")
    with pytest.raises(ValueError, match="64 tokens are longer than the model's max_seq_len = 32"):
        nelbo(denoiser, split, seq_len=64)
    with pytest.raises(DataError, match="outside a vocabulary of 17"):
        nelbo(denoiser, TokenSplit.from_arrays([1, 99, 2, 3]), seq_len=2)
    with pytest.raises(ValueError, match="every token of the split is special or padding"):
        nelbo(denoiser, TokenSplit.from_arrays([5] * 9), seq_len=4, special_ids=[5])
