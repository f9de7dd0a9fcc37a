"""Gaussian corruption: its moments, where it acts, and what it depends on."""

from __future__ import annotations

import pytest
import torch

from stackwise.objectives.bits import normals
from stackwise.objectives.gaussian import corrupt_embeddings, gaussian_noise


def test_noise_has_the_moments_and_the_shape_of_a_normal_distribution() -> None:
    ids = torch.arange(40)
    noise = gaussian_noise((40, 50, 100), 3, ids, ids * 0).double()
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    for power, moment, off in ((2, 1, 0.01), (3, 0, 0.04), (4, 3, 0.1)):
        assert float((noise**power).mean()) == pytest.approx(moment, abs=off)
    exact = torch.distributions.Normal(0.0, 1.0)
    for x in (-2.5, -1.0, 0.3, 2.0):
        assert float((noise < x).double().mean()) == pytest.approx(
            float(exact.cdf(torch.tensor(x))), abs=0.005
        )
    lags = [(noise[:, 1:], noise[:, :-1]), (noise[:, :, 1:], noise[:, :, :-1]), (noise[1:], noise[:-1])]
    assert all(abs(float((a * b).mean())) < 0.01 for a, b in lags)


def test_normal_numbers_are_float64_and_finite() -> None:
    ids = torch.arange(100)
    numbers = normals(0, ids, ids, 1000, "x")
    assert numbers.dtype == torch.float64
    assert 3.5 < float(numbers.abs().max()) < 8.5


def test_noise_depends_on_seed_sample_and_draw_alone() -> None:
    ids, draws = torch.randint(0, 10**9, (6,)), torch.randint(0, 5, (6,))
    whole = gaussian_noise((6, 4, 8), 1, ids, draws)
    order = torch.randperm(6)
    assert torch.equal(gaussian_noise((6, 4, 8), 1, ids[order], draws[order]), whole[order])
    assert torch.equal(gaussian_noise((6, 9, 8), 1, ids, draws)[:, :4], whole)
    for other in ((2, ids, draws), (1, ids + 1, draws), (1, ids, draws + 1)):
        assert (gaussian_noise((6, 4, 8), *other) == whole).sum() < 10  # of 192; one or two may be by chance


def test_corrupted_embeddings_are_the_formula_where_masked_and_untouched_elsewhere() -> None:
    x, ids, rates = torch.randn(3, 5, 4, dtype=torch.float64), torch.arange(3), torch.tensor([0.0, 0.3, 1.0])
    masks = torch.tensor([[True, False, True, False, True]]).expand(3, 5)
    out = corrupt_embeddings(x, masks, rates, 7, ids, ids)
    noise = gaussian_noise(x.shape, 7, ids, ids).double()
    assert torch.equal(out[~masks], x[~masks])
    assert torch.equal(out[0], x[0])
    assert torch.allclose(out[2][masks[2]], noise[2][masks[2]])
    expected = 0.7**0.5 * x[1] + 0.3**0.5 * noise[1]
    assert torch.allclose(out[1][masks[1]], expected[masks[1]], atol=1e-7)


def test_variance_is_kept_at_every_rate() -> None:
    x, ids, masks = torch.randn(20, 50, 64), torch.arange(20), torch.ones(20, 50, dtype=torch.bool)
    for rate in (0.1, 0.5, 0.9):
        out = corrupt_embeddings(x, masks, torch.full((20,), rate), 7, ids, ids)
        error = (2 / x.numel()) ** 0.5  # of the variance of so many numbers, and at most of their product
        assert float(out.var()) == pytest.approx(1, abs=6 * error)
        assert float((out * x).mean()) == pytest.approx((1 - rate) ** 0.5, abs=6 * error)


def test_gradient_reaches_the_embeddings_in_the_share_that_is_kept() -> None:
    x = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    ids, masks = torch.tensor([5]), torch.tensor([[True, False]])
    corrupt_embeddings(x, masks, torch.tensor([0.75], dtype=torch.float64), 0, ids, ids).sum().backward()
    assert x.grad is not None
    assert torch.allclose(
        x.grad, torch.tensor([0.5, 1.0], dtype=torch.float64)[None, :, None].expand(1, 2, 3)
    )


def test_half_precision_embeddings_stay_half() -> None:
    x, ids = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.arange(2)
    out = corrupt_embeddings(x, torch.ones(2, 3, dtype=torch.bool), torch.tensor([0.2, 0.9]), 0, ids, ids)
    assert out.dtype == torch.bfloat16
