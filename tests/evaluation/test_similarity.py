"""CKA and cosine from sums: what they must be, and a float64 reference on all tokens at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackwise.evaluation.similarity import Similarity

CPU = torch.device("cpu")


def reference_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. 2019, from the tokens themselves."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    shared = (y.t() @ x).norm() ** 2
    return float(shared / ((x.t() @ x).norm() * (y.t() @ y).norm()))


def of(*states: Tensor, pieces: int = 3, **options: int) -> Similarity:
    similarity = Similarity(len(states), states[0].shape[1], CPU, **options)
    for part in zip(*(state.chunk(pieces) for state in states), strict=True):
        similarity.add(part)
    return similarity


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(200, 12) + 3
    return x, x @ torch.randn(12, 12) * 0.3 + torch.randn(200, 12), torch.randn(200, 12)


def test_they_are_those_of_all_tokens_at_once(states: tuple[Tensor, Tensor, Tensor]) -> None:
    similarity = of(*states)
    cka, cosine = similarity.cka(), similarity.cosine()
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            assert cka[i][j] == pytest.approx(reference_cka(x, y), rel=1e-10)
            expected = torch.cosine_similarity(x.double(), y.double()).mean()
            assert cosine[i][j] == pytest.approx(float(expected), rel=1e-10)
    assert similarity.tokens == 200


def test_equal_representations_are_wholly_alike_whatever_the_rotation_scale_and_shift() -> None:
    x = torch.randn(90, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    turned = (x.double() @ rotation * 5 + torch.randn(8, dtype=torch.float64)).float()
    other = torch.randn(90, 8) + 0.5 * x
    cka = of(x, x.clone(), turned, other).cka()
    assert cka[0][1] == pytest.approx(1, abs=1e-12)
    assert cka[0][2] == pytest.approx(1, abs=1e-5)
    assert cka[2][3] == pytest.approx(cka[0][3], rel=1e-5)
    assert cka[0][3] < 0.9


def test_pieces_change_nothing(states: tuple[Tensor, Tensor, Tensor]) -> None:
    whole, pieces = of(*states, pieces=1), of(*states, pieces=40)
    for one, other in ((whole.cka(), pieces.cka()), (whole.cosine(), pieces.cosine())):
        assert [v for row in one for v in row] == pytest.approx([v for row in other for v in row], rel=1e-12)


def test_a_constant_is_like_nothing() -> None:
    constant = torch.full((60, 5), 7.3)
    similarity = of(torch.randn(60, 5), constant, torch.zeros(60, 5))
    assert similarity.cka()[0][1:] == [None, None]
    assert similarity.cka()[1][1] is None
    cosine = similarity.cosine()
    assert cosine[0][1] is not None
    assert cosine[0][2] is None


def test_above_the_largest_size_it_is_an_estimate_over_random_directions() -> None:
    x = torch.randn(500, 64)
    noisy = x + torch.randn(500, 64)
    exact, estimate = of(x, noisy), of(x, noisy, largest=64)
    assert (exact.directions, estimate.directions) == (64, 32)
    assert estimate.cka()[0][0] == pytest.approx(1, abs=1e-12)
    assert estimate.cka()[0][1] == pytest.approx(exact.cka()[0][1], abs=0.1)
    assert estimate.cka() == of(x, noisy, largest=64).cka()
    assert estimate.cosine() == exact.cosine()  # not an estimate
