"""Masks: how many, which, never padding; BERT's three ways; times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackwise.objectives import masking
from stackwise.objectives.bits import scores, uniforms
from stackwise.objectives.masking import below, bert, choose, eligible_positions, times
from stackwise.objectives.schedules import NoiseSchedule


def samples(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n) * 3 + 11, torch.zeros(n, dtype=torch.long)


def test_eligible_are_the_tokens_that_are_neither_special_nor_padding() -> None:
    ids = torch.tensor([[1, 5, 2, 6, 0, 0]], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    assert eligible_positions(ids, mask, [2]).tolist() == [[True, True, False, True, True, False]]
    assert eligible_positions(ids, None, torch.tensor([1])).tolist() == [[False] + [True] * 5]
    assert eligible_positions(ids, None, ()).all()


def test_exactly_the_wanted_count_is_chosen_or_all_that_is_eligible() -> None:
    ids, draws = samples(200)
    eligible = torch.rand(200, 40) < torch.rand(200, 1)
    counts = torch.randint(0, 41, (200,))
    chosen = choose(scores(1, ids, draws, 40, "mask"), eligible, counts)
    assert torch.equal(chosen.sum(1), torch.minimum(counts, eligible.sum(1)))
    assert not (chosen & ~eligible).any()


def test_equal_scores_change_no_count() -> None:
    chosen = choose(
        torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool), torch.tensor([2, 5])
    )
    assert chosen.sum(1).tolist() == [2, 5]


def test_every_set_of_positions_is_equally_likely() -> None:
    ids, draws = samples(60_000)
    eligible = torch.tensor([True, True, False, True, True, True]).expand(60_000, 6)
    chosen = choose(scores(3, ids, draws, 6, "mask"), eligible, torch.full((60_000,), 2))
    codes = (chosen * 2 ** torch.arange(6)).sum(1)
    found, counts = codes.unique(return_counts=True)
    assert len(found) == 10  # 5 over 2
    assert float(((counts - 6000) ** 2 / 6000).sum()) < 27.9  # chi-square, 9 degrees, p = 0.001


def test_more_noise_only_adds_to_the_mask() -> None:
    ids, draws = samples(64)
    s, u = scores(0, ids, draws, 50, "mask"), uniforms(0, ids, draws, 50, "mask")
    eligible = torch.rand(64, 50) < 0.8
    inside = torch.zeros_like(eligible)
    for count in range(51):
        chosen = choose(s, eligible, torch.full((64,), count))
        assert not (inside & ~chosen).any()
        inside = chosen
    assert torch.equal(inside, eligible)
    lower, upper = torch.rand(2, 64, dtype=torch.float64).sort(0).values
    assert not (below(u, eligible, lower) & ~below(u, eligible, upper)).any()


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_the_masked_share_at_each_time_is_that_of_the_schedule(kind: str) -> None:
    ids, draws = samples(1000)
    u, eligible = uniforms(7, ids, draws, 500, "mask"), torch.ones(1000, 500, dtype=torch.bool)
    for t in (0.1, 0.3, 0.5, 0.8, 1.0):
        rate = NoiseSchedule(kind).rate(t)
        share = below(u, eligible, torch.full((1000,), rate)).double().mean()
        assert float(share) == pytest.approx(rate, rel=0.02)


def test_bert_writes_the_mask_a_random_token_or_the_token_itself() -> None:
    ids, draws = samples(800)
    tokens = masking.ordinary_tokens(50, {0, 1, 49})
    assert tokens.tolist() == list(range(2, 49))
    rows = masking.random_tokens(torch.rand(800, 125, dtype=torch.float64), tokens)
    masks = torch.rand(800, 125) < 0.5
    stand_in = masking.random_tokens(uniforms(0, ids, draws, 125, "tokens"), tokens)
    out = bert(rows, masks, 49, stand_in, uniforms(0, ids, draws, 125, "bert"))
    assert torch.equal(out[~masks], rows[~masks])
    before, after = rows[masks], out[masks]
    n, masked, kept = len(before), after == 49, after == before
    assert float(masked.sum() / n) == pytest.approx(0.8, abs=0.01)
    # a random token is the token itself once in 47 times
    assert float(kept.sum() / n) == pytest.approx(0.1 + 0.1 / 47, abs=0.01)
    drawn = after[~masked & ~kept]
    assert set(drawn.tolist()) == set(tokens.tolist())


def test_bert_chances_of_zero_and_one() -> None:
    ids = torch.full((3, 4), 5)
    masks, other, u = torch.ones(3, 4, dtype=torch.bool), torch.full((3, 4), 7), torch.rand(3, 4)
    assert (bert(ids, masks, 9, other, u, (1.0, 0.0, 0.0)) == 9).all()
    assert (bert(ids, masks, 9, other, u, (0.0, 1.0, 0.0)) == 7).all()
    assert (bert(ids, masks, 9, other, u, (0.0, 0.0, 1.0)) == 5).all()


def test_no_ordinary_token_left_is_an_error() -> None:
    with pytest.raises(ValueError, match="all 3 ids"):
        masking.ordinary_tokens(3, {0, 1, 2})


@pytest.mark.parametrize("kind", masking.TIME_KINDS)
def test_times_are_even_inside_the_unit_interval(kind: str) -> None:
    ids, draws = samples(20_000)
    t = times(4, ids, draws, torch.arange(20_000), kind)
    assert t.dtype == torch.float64
    assert 0 < float(t.min()) < 0.001
    assert 0.999 < float(t.max()) <= 1
    counts = torch.histc(t, bins=20, min=0, max=1)
    assert float((counts - 1000).abs().max()) < (5 if kind == "stratified" else 150)


def test_stratified_times_are_even_over_any_run_and_exact_far_out() -> None:
    ids, draws = samples(64)
    for start in (0, 1000, 10**15):
        t = times(4, ids, draws, start + torch.arange(64), "stratified").sort().values
        assert float(t.diff().max()) < 3 / 64
        step = (t[:, None] - t[None]).remainder(1)
        golden = (5**0.5 - 1) / 2
        assert float((step - golden).abs().min()) < 1e-12
    later = times(4, ids, draws + 1, torch.arange(64), "stratified")
    assert not torch.allclose(later, times(4, ids, draws, torch.arange(64), "stratified"))


def test_antithetic_times_come_in_pairs_around_the_middle() -> None:
    ids, draws = samples(100)
    t = times(4, ids, draws, torch.arange(100), "antithetic")
    assert torch.equal(t[0::2] + t[1::2], torch.ones(50, dtype=torch.float64))
    assert len(t.unique()) == 100


def test_uniform_times_follow_the_sample_and_not_its_place() -> None:
    ids, draws = samples(10)
    places = torch.arange(10)
    assert torch.equal(times(4, ids, draws, places, "uniform"), times(4, ids, draws, places + 5, "uniform"))
    order = torch.randperm(10)
    assert torch.equal(
        times(4, ids[order], draws, places, "uniform"), times(4, ids, draws, places, "uniform")[order]
    )


def test_an_unknown_kind_of_times_is_named() -> None:
    ids, draws = samples(2)
    with pytest.raises(ValueError, match=r"stratified, antithetic, uniform; did you mean 'stratified'"):
        times(0, ids, draws, ids, "stratifed")
