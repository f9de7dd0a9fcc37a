"""Likelihoods of continuations: equal to the plain formula, whatever the batch, and with shared beginnings read once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.data.errors import DataError
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.evaluation import likelihood
from stackwise.evaluation.likelihood import CausalScorer
from stackwise.evaluation.masked_likelihood import MaskedScorer
from stackwise.evaluation.requests import Request, encode
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import Denoiser

V, LIMIT, MASK = 19, 48, 18


def rack_of(preset: str = "gpt_style", **options: Any) -> Rack:
    options = {"max_seq_len": LIMIT, "attention_preset": preset, **options}
    return create_simple_rack(2, 1, 16, 24, 2, V, **options).double().eval()


def ids(generator: torch.Generator, low: int, high: int) -> tuple[int, ...]:
    """So many random tokens, none of them the mask."""
    count = int(torch.randint(low, high + 1, (1,), generator=generator))
    return tuple(torch.randint(0, MASK, (count,), generator=generator).tolist())


def requests_of(seed: int, shared: int = 0) -> list[Request]:
    """Contexts with two continuations each, one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    lead = ids(generator, shared, shared)
    found = []
    for key in range(12):
        context = lead + ids(generator, 1, 9)
        found += [Request(context, ids(generator, 1, 5), key), Request(context, (key,), key)]
    return found


def plainly(rack: Rack, request: Request) -> tuple[float, bool]:
    """log p by the definition, one row at a time."""
    whole = (request.context + request.continuation)[-LIMIT - 1 :]
    with torch.no_grad():
        log_p = rack(torch.tensor([whole[:-1]])).log_softmax(-1)[0]
    n = len(request.continuation)
    places = range(len(whole) - 1 - n, len(whole) - 1)
    terms = [float(log_p[at, token]) for at, token in zip(places, whole[-n:], strict=True)]
    return math.fsum(terms), all(
        int(log_p[at].argmax()) == t for at, t in zip(places, whole[-n:], strict=True)
    )


@pytest.mark.parametrize("shared", [0, 25])
@pytest.mark.parametrize(
    "rack_options",
    [
        {},
        {"use_rope": True},
        {"window": 8},
        {"short_conv": 3},
        {"preset": "kernel_attention", "causal": True},
        {"preset": "mla_attention", "causal": True},
        {"preset": "efficient_gqa", "causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_causal_scores_are_those_of_the_formula(rack_options, shared, batch_size):
    rack, requests = rack_of(**rack_options), requests_of(3, shared)
    found = CausalScorer(rack, 0, batch_size=batch_size).score(requests, greedy=True)
    for request, score in zip(requests, found, strict=True):
        nats, greedy = plainly(rack, request)
        assert score.nats == pytest.approx(nats, abs=1e-9)
        assert (score.greedy, score.cut) == (greedy, 0)


def test_the_likeliest_continuation_is_called_greedy():
    rack, context = rack_of(), (3, 1, 4)
    with torch.no_grad():
        best = int(rack(torch.tensor([context]))[0, -1].argmax())
    worse = (best + 1) % V
    found = CausalScorer(rack, 0).score([Request(context, (best,)), Request(context, (worse,))], greedy=True)
    assert [score.greedy for score in found] == [True, False]
    assert found[0].nats > found[1].nats


def test_beginnings_of_other_rows_and_a_common_beginning_are_read_once(monkeypatch):
    rack, read = rack_of(), []
    features = rack.forward_features
    monkeypatch.setattr(
        rack, "forward_features", lambda ids, *a, **o: read.append(ids.numel()) or features(ids, *a, **o)
    )
    context = tuple(range(17))
    single = [Request(context, (token,)) for token in range(6)]
    CausalScorer(rack, 0).score(single)
    assert read == [17]
    read.clear()
    fewshot = [Request(context * 2 + (token,), (1, 2)) for token in range(6)]
    CausalScorer(rack, 0).score(fewshot)
    assert read == [34, 6 * 2]
    # A context that ends within the common beginning: its first scored token must not be lost.
    mixed = [*fewshot, Request(context[:3], context[3:5])]
    for request, score in zip(mixed, CausalScorer(rack, 0).score(mixed), strict=True):
        assert score.nats == pytest.approx(plainly(rack, request)[0], abs=1e-9)


def test_a_context_that_is_too_long_loses_its_beginning():
    rack = rack_of()
    long = Request(tuple(range(16)) * 4, (1, 2, 3))
    score = CausalScorer(rack, 0).score([long])[0]
    assert score.cut == 64 + 2 - LIMIT
    assert score.nats == pytest.approx(plainly(rack, long)[0], abs=1e-9)


def conditionals(rack: Rack, row: list[int], hidden: list[int], banned: bool) -> list[float]:
    """-log p of the hidden tokens of a row, given the others."""
    masked = torch.tensor([row])
    masked[0, hidden] = MASK
    with torch.no_grad():
        logits: Tensor = rack(masked)[0]
    if banned:
        logits[:, MASK] = -torch.inf
    log_p = logits.log_softmax(-1)
    return [-float(log_p[at, row[at]]) for at in hidden]


@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_a_pseudo_likelihood_hides_each_token_alone(batch_size):
    rack = rack_of("bert_style")
    requests = [r for r in requests_of(5) if set(r.continuation) != {0}]
    requests += [Request((), (4, 5, 6)), Request((2,), (0, 7))]
    scorer = MaskedScorer(Denoiser(rack, MASK), special_ids=(0,), batch_size=batch_size)
    for request, score in zip(requests, scorer.score(requests), strict=True):
        row = list(request.context + request.continuation)
        places = [at for at in range(len(request.context), len(row)) if row[at] != 0]
        expected = -sum(conditionals(rack, row, [at], banned=True)[0] for at in places)
        # the head is read in single precision
        assert score.nats == pytest.approx(expected, abs=1e-5)


def test_a_bound_is_the_mean_over_all_masks():
    """Against the formula with every mask of every count, and exactly where one token is scored."""
    rack = rack_of("bert_style")
    request, single = Request((1, 2, 3), (4, 5, 6), key=2), Request((1, 2), (9,))
    scorer = MaskedScorer(Denoiser(rack, MASK), mc_samples=3000)
    row, places, n = [1, 2, 3, 4, 5, 6], [3, 4, 5], 3
    bound = 0.0
    for k in range(1, n + 1):
        losses = [sum(conditionals(rack, row, list(c), True)) for c in itertools.combinations(places, k)]
        bound += sum(losses) / len(losses) * n / k / n
    assert scorer.score([request])[0].nats == pytest.approx(-bound, rel=0.01)
    exact = MaskedScorer(Denoiser(rack, MASK), mc_samples=2).score([single])[0].nats
    assert exact == pytest.approx(-conditionals(rack, [1, 2, 9], [2], True)[0], abs=1e-5)


@pytest.mark.parametrize("mc_samples", [None, 5])
def test_masked_scores_do_not_depend_on_the_batch_or_the_company(mc_samples):
    denoiser, requests = Denoiser(rack_of("bert_style"), MASK), requests_of(6)
    whole = MaskedScorer(denoiser, mc_samples=mc_samples).score(requests, greedy=True)
    for size in (1, 4):
        scorer = MaskedScorer(denoiser, batch_size=size, mc_samples=mc_samples)
        for a, b in zip(scorer.score(requests, greedy=True), whole, strict=True):
            assert a.nats == pytest.approx(b.nats, abs=1e-5)
            assert a.greedy == b.greedy
    alone = MaskedScorer(denoiser, mc_samples=mc_samples).score(requests[7:8], greedy=True)[0]
    assert alone.nats == pytest.approx(whole[7].nats, abs=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_progress_rises_to_all_rows(causal):
    rack = rack_of() if causal else rack_of("bert_style")
    scorer = (
        CausalScorer(rack, 0, batch_size=5) if causal else MaskedScorer(Denoiser(rack, MASK), batch_size=5)
    )
    heard: list[tuple[int, int]] = []
    scorer.score(requests_of(6), progress=lambda done, total: heard.append((done, total)))
    done = [at for at, _ in heard]
    assert len({total for _, total in heard}) == 1
    assert (done, done[-1]) == (sorted(set(done)), heard[0][1])


def test_a_bound_hides_other_tokens_under_another_key():
    scorer = MaskedScorer(Denoiser(rack_of("bert_style"), MASK), mc_samples=2)
    texts = [Request((1, 2), (3, 4, 5, 6, 7, 8), key) for key in (0, 0, 1, 2, 3)]
    found = [score.nats for score in scorer.score(texts)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_a_shifted_model_never_hides_the_first_token_of_a_row():
    rack = rack_of("bert_style")
    scorer = MaskedScorer(Denoiser(rack, MASK, shifted=True), start=0)
    masked = torch.tensor([[1, 2, MASK]])
    with torch.no_grad():
        logits = rack(masked)[0, 1]
    logits[MASK] = -torch.inf
    expected = float(logits.log_softmax(-1)[5])
    assert scorer.score([Request((1, 2), (5,))])[0].nats == pytest.approx(expected, abs=1e-5)
    with pytest.raises(DataError, match="all are special"):
        scorer.score([Request((), (5,))])


def test_what_cannot_be_scored_is_refused_with_its_place():
    causal = CausalScorer(rack_of(), 0)
    for request, message in (
        (Request((1,), ()), "x:3: a continuation is empty"),
        (Request((), (1,)), "needs a token before"),
        (Request((1,), (1,) * (LIMIT + 1)), "49 tokens, more than max_seq_len = 48"),
    ):
        with pytest.raises(DataError, match=message):
            causal.score([request], wheres=["x:3"])
    masked = MaskedScorer(Denoiser(rack_of("bert_style"), MASK), special_ids=(0,))
    with pytest.raises(DataError, match=r"x:4: .*all are special"):
        masked.score([Request((1,), (0,))], wheres=["x:4"])
    with pytest.raises(ValueError, match="causal rack"):
        CausalScorer(rack_of("bert_style"), 0)
    with pytest.raises(ValueError, match="mc_samples must be at least 1"):
        MaskedScorer(Denoiser(rack_of("bert_style"), MASK), mc_samples=0)


def test_texts_are_cut_where_their_tokens_are():
    codec = ByteTokenizer()
    assert encode(codec, "ab", " c", 256) == Request((97, 98), (32, 99))
    assert encode(codec, "ab ", "c", 256) == Request((97, 98), (32, 99))
    assert encode(codec, "", "c", 256, 4) == Request((256,), (99,), 4)
    assert encode(codec, "", "c", None) == Request((), (99,))
    assert encode(codec, "\n", "c", None) == Request((), (10, 99))
    # a text that begins with the start token has it once
    assert encode(codec, "", "ac", 97) == Request((97,), (99,))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"training_objective": "custom"}, "a run of the objective custom"),
        ({"training_objective": "diffusion", "corruption": "gaussian"}, "gaussian corruption hides no token"),
    ],
)
def test_a_run_that_gives_no_likelihood_is_refused(tiny, keys, message):
    config = tiny()
    config.training.progressive.__dict__["training_objective"] = keys["training_objective"]
    config.objective.__dict__["corruption"] = keys.get("corruption", "auto")
    with pytest.raises(DataError, match=message):
        likelihood.scorer_of(rack_of("bert_style"), config, ByteTokenizer())


def test_the_batches_hold_every_row_once():
    rows = [(tuple(range(n)), [n]) for n in (5, 1, 9, 3)]
    batches = list(likelihood._batches(rows, 3))
    assert [[len(ids) for ids, _ in batch] for batch in batches] == [[9, 5, 3], [1]]
    assert sorted(i for batch in batches for _, listed in batch for i in listed) == [1, 3, 5, 9]
