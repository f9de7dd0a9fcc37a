"""Reference lines: what guessing without a model costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stackwise.data import reference
from stackwise.data.corpus import TokenSplit
from stackwise.data.errors import DataError
from stackwise.data.reference import counts_of, reference_lines


def split_of(*tokens: int) -> TokenSplit:
    return TokenSplit.from_arrays(tokens)


def test_the_lines_by_hand() -> None:
    """Ids 0 to 3, of which 3 is special; training holds 0 three times and 1 once, 2 never."""
    lines = reference_lines(split_of(0, 0, 3, 1, 0), split_of(0, 1, 1, 3, 2), 4, [3])
    assert lines.uniform == pytest.approx(math.log(3))
    costs = [math.log(7 / 4), math.log(7 / 2), math.log(7 / 2), math.log(7)]  # one more of each, 4 + 3 in all
    assert lines.unigram == pytest.approx(sum(costs) / 4)
    assert lines.unigram_accuracy == 1 / 4  # always 0
    assert str(lines) == f"uniform 1.099, unigram {sum(costs) / 4:.3f} nats per token"


def test_of_even_text_both_lines_are_log_v() -> None:
    even = split_of(*range(50), *range(50))
    lines = reference_lines(even, even, 50)
    assert lines.uniform == lines.unigram == pytest.approx(math.log(50))


def test_much_training_text_makes_the_unigram_line_its_entropy() -> None:
    chances = np.array([0.7, 0.2, 0.1])
    tokens = np.random.default_rng().choice(3, 200_000, p=chances)
    split = TokenSplit.from_arrays(tokens)
    entropy = -float((chances * np.log(chances)).sum())
    assert reference_lines(split, split, 3).unigram == pytest.approx(entropy, abs=0.01)


def test_counting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng().integers(0, 9, 101)
    monkeypatch.setattr(reference, "AT_A_TIME", 7)
    assert counts_of(TokenSplit.from_arrays(tokens)).tolist() == np.bincount(tokens).tolist()


def test_what_has_no_lines_says_why() -> None:
    with pytest.raises(DataError, match="outside a vocabulary of 3"):
        reference_lines(split_of(0, 1), split_of(0, 7), 3)
    with pytest.raises(ValueError, match="every token of the held-out split is special"):
        reference_lines(split_of(0, 1), split_of(2, 2), 3, [2])
