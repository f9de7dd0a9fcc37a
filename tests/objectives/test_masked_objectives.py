"""What the objectives mlm, diffusion and custom make of a batch, and what their losses are."""

import pytest
import torch
from torch.nn import functional as F

from stackwise.model.own_io import Head
from stackwise.objectives.base import IGNORE
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.custom import Custom, load_function
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.masked import MaskedLM, Vocabulary, scored_positions

V, MASK, PAD = 30, 29, 28
VOCABULARY = Vocabulary(V, MASK, (PAD,))


def diffusion(**options):
    return Diffusion(VOCABULARY, 5, "absorbing", **options)


def mlm(**options):
    return MaskedLM(VOCABULARY, 5, options.pop("corruption", "bert"), **options)


def batch(rows=6, length=20, **more):
    return {
        "input_ids": torch.randint(0, 28, (rows, length)),
        "sample_ids": torch.randperm(1000)[:rows],
        "draws": torch.zeros(rows, dtype=torch.long),
        "places": torch.arange(rows),
        **more,
    }


def plain_losses(hidden, matrix, example, banned=None):
    """-log p [B, T] of every label by the plainest means, 0 where there is none."""
    logits = (hidden.double() @ matrix.double().t()).clone()
    if banned is not None:
        logits[..., banned] = -torch.inf
    nll = -logits.log_softmax(-1).gather(-1, example.labels.clamp_min(0)[..., None])[..., 0]
    return torch.where(example.labels == IGNORE, 0.0, nll)


@pytest.mark.parametrize("make", [mlm, diffusion])
def test_only_scored_positions_are_changed_and_never_special_ones(make):
    given = batch()
    given["input_ids"][2, 5:] = PAD
    given["attention_mask"] = given["input_ids"] != PAD
    example = make().corrupt(given)
    scored = example.labels != IGNORE
    assert torch.equal(example.input_ids[~scored], given["input_ids"][~scored])
    assert torch.equal(example.labels[scored], given["input_ids"][scored])
    assert not scored[given["input_ids"] == PAD].any()
    assert scored.any(1).all(), "every row has something to say"
    listed = example.scored
    assert torch.equal(listed[: int(scored.sum())], scored.flatten().nonzero().squeeze(1))
    assert (example.labels.flatten()[listed[int(scored.sum()) :]] == IGNORE).all()


def test_a_row_with_nothing_to_corrupt_costs_nothing():
    given = batch(2, 8)
    given["input_ids"][0] = PAD
    for objective in (mlm(), diffusion(), diffusion(form="t"), diffusion(weighting="uniform")):
        example = objective.corrupt(given)
        hidden, matrix = torch.randn(2, 8, 4), torch.randn(V, 4)
        total, weight = objective.loss(hidden, Head.of(matrix), example)
        alone, its_weight = objective.loss(
            hidden[1:], Head.of(matrix), objective.corrupt({k: v[1:] for k, v in given.items()})
        )
        torch.testing.assert_close(total, alone)
        assert weight == its_weight
        nothing = objective.corrupt({k: v[:1] for k, v in given.items()})
        assert objective.loss(hidden[:1], Head.of(matrix), nothing)[0] == 0


def test_the_mlm_loss_is_the_mean_over_the_corrupted_tokens():
    objective, given = mlm(fraction=0.3), batch()
    example = objective.corrupt(given)
    hidden, matrix = torch.randn(6, 20, 8), torch.randn(V, 8)
    total, weight = objective.loss(hidden, Head.of(matrix), example, rows_per_chunk=7)
    assert weight == 6 * 6
    torch.testing.assert_close(
        total.double(), plain_losses(hidden, matrix, example).sum(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("form", ["count", "t"])
@pytest.mark.parametrize("noise", [None, (0.25, 0.5)])
def test_the_diffusion_loss_is_the_weighted_sum_of_its_formula(form, noise):
    objective, given = diffusion(form=form), batch()
    example = objective.corrupt(given, noise)
    hidden, matrix = torch.randn(6, 20, 8), torch.randn(V, 8)
    total, weight = objective.loss(hidden, Head.of(matrix), example)
    per_row = plain_losses(hidden, matrix, example, banned=MASK).sum(1)
    masked = (example.labels != IGNORE).sum(1)
    if form == "count":
        expected = per_row * 20 / masked
        if noise is not None:
            assert ((masked > 5) & (masked <= 10)).all()
    else:
        expected = per_row * example.weights  # 1/t, and over a range its mean over the shares
    assert weight == 6 * 20
    torch.testing.assert_close(total.double(), expected.sum(), rtol=1e-5, atol=1e-4)


def test_a_uniform_model_costs_log_v_in_every_form():
    given = {name: torch.cat([t] * 40) for name, t in batch(50, 20).items()}
    given["sample_ids"] = torch.arange(2000)
    given["places"] = torch.arange(2000)
    hidden, matrix = torch.zeros(2000, 20, 4), torch.zeros(V, 4)
    expected = torch.tensor(float(V - 1)).log()
    for noise in (None, (0.5, 0.75)):
        for options in ({}, {"form": "t"}, {"weighting": "uniform"}, {"form": "t", "weighting": "clipped"}):
            objective = diffusion(**options)
            total, weight = objective.loss(hidden, Head.of(matrix), objective.corrupt(given, noise))
            rtol = 0.06 if "form" in options else 1e-4  # the t form has the spread of 1/t
            torch.testing.assert_close(total / weight, expected, rtol=rtol, atol=0)


def test_the_loss_does_not_depend_on_how_rows_are_batched():
    given, hidden, matrix = batch(32), torch.randn(32, 20, 8), torch.randn(V, 8)
    for objective in (mlm(), diffusion(), diffusion(form="t"), mlm(corruption="gaussian")):
        whole = objective.loss(hidden, Head.of(matrix), objective.corrupt(given))
        parts = [
            objective.loss(
                hidden[rows], Head.of(matrix), objective.corrupt({k: v[rows] for k, v in given.items()})
            )
            for rows in torch.randperm(32).split(8)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(sum(p[1] for p in parts), whole[1])


def test_draws_come_again_where_their_number_is_fixed():
    given = batch()
    for objective in (mlm(draws=3), diffusion(draws=3)):
        seen = []
        for number in range(6):
            # the pass puts a sample in another place, which must not matter
            keys = {"draws": torch.full((6,), number), "places": torch.randint(0, 999, (6,))}
            seen.append(objective.corrupt({**given, **keys}).input_ids)
        assert all(torch.equal(seen[i], seen[i + 3]) for i in range(3))
        assert not torch.equal(seen[0], seen[1])


def test_evaluation_hides_other_tokens_than_training_and_the_same_at_every_call():
    given = batch()
    for objective in (mlm(length_fraction=1.0), diffusion(form="t", weighting="uniform")):
        judge = objective.for_evaluation()
        first, again = judge.corrupt(given), judge.corrupt(given)
        assert torch.equal(first.input_ids, again.input_ids)
        assert not torch.equal(first.labels, objective.corrupt(given).labels)
        assert first.attention_mask is None
    assert first.weights is not None, "the bound, whatever is trained with"


def test_shifted_targets_are_read_one_position_earlier_and_stay_in_their_document():
    objective, given = diffusion(shifted=True), batch()
    given["document_ids"] = (torch.arange(20) >= 7).int().expand(6, 20)
    plain = diffusion().corrupt(given, counts=torch.full((6,), 20))
    example = objective.corrupt(given, counts=torch.full((6,), 20))
    assert (example.input_ids[:, 0] != MASK).all()
    assert (example.input_ids[:, 7] != MASK).all()
    assert torch.equal(example.labels[:, :6], plain.labels[:, 1:7])
    assert (example.labels[:, [6, 19]] == IGNORE).all()


def test_random_lengths_cut_rows_and_nothing_behind_the_cut_is_scored():
    example = mlm(length_fraction=1.0).corrupt(batch(200))
    lengths = example.attention_mask.sum(1)
    assert 1 <= lengths.min() < 4 < 17 < lengths.max() <= 20
    assert not (example.labels != IGNORE)[~example.attention_mask].any()
    half = mlm(length_fraction=0.5).corrupt(batch(400)).attention_mask.sum(1)
    assert 0.4 < (half == 20).float().mean() < 0.65


def test_gaussian_noise_is_learned_as_token_or_as_noise():
    given, x = batch(), torch.randn(6, 20, 8)
    objective = mlm(corruption="gaussian", predict="noise", fraction=0.5)
    example = objective.corrupt(given)
    assert torch.equal(example.input_ids, given["input_ids"])
    noisy = objective.embedded(x, example)
    chosen = example.labels != IGNORE
    assert torch.equal(noisy[~chosen], x[~chosen])
    noise = (noisy - 0.5**0.5 * x) / 0.5**0.5
    total, weight = objective.loss(noise, Head.of(torch.randn(V, 8)), example)
    assert total / weight < 1e-10, "the noise itself is the answer"
    assert objective.loss(noise + 1, Head.of(torch.randn(V, 8)), example)[0] / weight == pytest.approx(
        1.0, rel=1e-4
    )


def test_custom_takes_targets_as_they_are():
    ids, targets = torch.randint(0, V, (2, 5)), torch.randint(0, V, (2, 5))
    keep = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1]])
    for name in ("targets", "labels"):
        example = Custom().corrupt({"input_ids": ids, name: targets, "loss_mask": keep})
        assert torch.equal(example.labels, torch.where(keep.bool(), targets, IGNORE))
        assert torch.equal(example.input_ids, ids)
    with pytest.raises(KeyError, match="'targets' nor 'labels'"):
        Custom().corrupt({"input_ids": ids})
    with pytest.raises(ValueError, match=r"targets must be \[2, 5\]"):
        Custom().corrupt({"input_ids": ids, "targets": targets[:, :3]})


def test_custom_losses_are_called_with_the_scored_logits():
    ids, hidden, matrix = torch.randint(0, V, (2, 5)), torch.randn(2, 5, 4), torch.randn(V, 4)
    smooth = Custom(lambda logits, y: F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1))
    example = smooth.corrupt({"input_ids": ids})
    total, weight = smooth.loss(hidden, Head.of(matrix), example)
    logits = (hidden @ matrix.t()).flatten(0, 1)
    expected = F.cross_entropy(logits, ids.flatten(), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(total, expected)
    assert weight == 10
    with pytest.raises(ValueError, match=r"shape \[\], not \[10\]"):
        Custom(F.cross_entropy).loss(hidden, Head.of(matrix), example)


def test_a_loss_function_is_found_by_name_or_refused():
    assert load_function("torch.nn.functional:cross_entropy") is F.cross_entropy
    for name in ("torch.nn.functional", "no.such.module:f", "torch:no_such", "torch:pi"):
        with pytest.raises(ValueError, match=r"objective\.loss_fn"):
            load_function(name)


def test_objectives_without_noise_take_none():
    for objective in (CausalLM(), Custom()):
        with pytest.raises(ValueError, match="corrupts nothing"):
            objective.corrupt({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, (0.0, 0.5))


def test_numbers_of_scored_positions_are_few():
    sizes = {len(scored_positions(torch.where(torch.rand(8, 64) < p, 1, IGNORE))) for p in torch.rand(200)}
    assert len(sizes) <= 17
    assert all(size % 32 == 0 for size in sizes)
