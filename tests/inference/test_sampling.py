"""Each way of choosing a token against a computation by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.inference.sampling import keep_top_k, keep_top_p, next_tokens, penalise_repetition

INF = math.inf


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def kept(rows: torch.Tensor) -> list[list[int]]:
    return [(row > -INF).nonzero().flatten().tolist() for row in rows]


def draw(rows: torch.Tensor, seed: int = 0, **options: float) -> list[int]:
    return next_tokens(rows, torch.Generator().manual_seed(seed), **options).tolist()


def test_top_k_keeps_the_largest_and_what_ties_with_them() -> None:
    rows = torch.tensor([[1.0, 5.0, 3.0, 4.0], [2.0, 2.0, 1.0, 0.0]])
    assert kept(keep_top_k(rows, 2)) == [[1, 3], [0, 1]]
    assert kept(keep_top_k(torch.tensor([[1.0, 3.0, 1.0]]), 2)) == [[0, 1, 2]]
    assert torch.equal(keep_top_k(rows, 9), rows)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.4, [2]), (0.5, [2]), (0.51, [0, 2]), (0.8, [0, 2]), (0.85, [0, 1, 2]), (1e-9, [2])],
)
def test_top_p_keeps_the_smallest_set_that_holds_the_probability(p: float, expected: list[int]) -> None:
    # 0.5 and 0.3125 and 0.125 are sums of powers of two, so that the edges are exact
    assert kept(keep_top_p(logits(0.3125, 0.125, 0.5, 0.0625).exp().log(), p)) == [expected]


def test_of_equally_likely_tokens_top_p_takes_the_first() -> None:
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [[0, 1]]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12), st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_top_p_holds_the_probability_and_no_smaller_set_does(values: list[float], p: float) -> None:
    rows = torch.tensor([values], dtype=torch.float64)
    probabilities = rows.softmax(-1)[0]
    chosen = kept(keep_top_p(rows, p))[0]
    total = float(probabilities[chosen].sum())
    assert total >= p - 1e-9
    assert total - float(probabilities[chosen].min()) < p + 1e-9


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    rows = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    present = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(rows, present, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]


def test_temperature_zero_is_the_first_of_the_largest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    rows = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    assert next_tokens(rows, generator, temperature=0.0, top_k=2, top_p=0.5).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), state)


def test_the_penalty_also_steers_greedy_choice() -> None:
    rows, present = torch.tensor([[3.0, 2.0]]), torch.tensor([[True, False]])
    generator = torch.Generator()
    options = {"temperature": 0.0, "present_BV": present}
    assert next_tokens(rows, generator, repetition_penalty=1.4, **options).tolist() == [0]
    assert next_tokens(rows, generator, repetition_penalty=1.6, **options).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature: float) -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    n = 20_000
    drawn = torch.tensor(draw(probabilities.log().expand(n, 3), temperature=temperature))
    expected = probabilities ** (1 / temperature)
    expected /= expected.sum()
    error = (drawn.bincount(minlength=3) / n - expected).abs()
    assert bool((error < 4 * (expected * (1 - expected) / n).sqrt()).all())


def test_what_the_filters_drop_is_never_drawn() -> None:
    rows = logits(0.4, 0.3, 0.2, 0.1).expand(500, 4)
    assert set(draw(rows, top_k=2)) == {0, 1}
    assert set(draw(rows, top_p=0.65)) == {0, 1}
    # top-k first: of the two that are left, the first alone holds 4/7 of the probability
    assert set(draw(rows, top_k=2, top_p=0.5)) == {0}


def test_the_same_seed_draws_the_same() -> None:
    rows = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    assert draw(rows, seed=5) == draw(rows, seed=5)
    assert draw(rows, seed=5) != draw(rows, seed=6)
