"""Samplers of masked diffusion: what they draw, what they leave alone, what they take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.inference.canvas import certainty, gumbel_max, highest
from stackwise.inference.denoise import Denoised, denoise
from stackwise.inference.samplers import SAMPLERS, share_left
from stackwise.objectives.intervals import Intervals

V, T, MASK = 3, 3, 3


class Known:
    """A model that knows a joint distribution of T tokens [V, V, V] and predicts its conditionals exactly."""

    mask_id = MASK
    intervals: Intervals | None = Intervals.linear(T)
    shifted = False

    def __init__(self, joint: Tensor) -> None:
        self.forwards = 0
        self.asked: list[int] = []
        self.shares: list[list[float]] = []
        self.table = torch.full((4,) * T + (T, V + 1), -math.inf, dtype=torch.float64)
        for seen in itertools.product(range(V + 1), repeat=T):
            given = joint
            for place, token in enumerate(seen):
                if token != MASK:
                    keep = torch.zeros(V, dtype=torch.bool)
                    keep[token] = True
                    given = given.masked_fill(~keep.view([-1 if i == place else 1 for i in range(T)]), 0)
            for place in range(T):
                marginal = given.sum([i for i in range(T) if i != place])
                self.table[(*seen, place)][:V] = marginal.log()

    def logits(self, input_ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
        self.forwards += 1
        self.asked.append(len(input_ids))
        if given.get("shares") is not None:
            self.shares.append(given["shares"].tolist())
        everywhere = self.table[tuple(input_ids.T)]
        return everywhere.flatten(0, 1)[positions].float()


def joint_of(seed: int) -> Tensor:
    """Tokens that depend on each other strongly."""
    generator = torch.Generator().manual_seed(seed)
    weights = (2 * torch.randn((V,) * T, generator=generator, dtype=torch.float64)).exp()
    return weights / weights.sum()


def independent(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = (1.5 * torch.randn(T, V, generator=generator, dtype=torch.float64)).softmax(-1)
    return torch.einsum("a,b,c->abc", *parts)


def chi_square(ids: Tensor, joint: Tensor) -> float:
    """Pearson's statistic of the drawn triples, 26 degrees of freedom: above 54 once in a thousand."""
    cells = (ids * torch.tensor([V * V, V, 1])).sum(1)
    seen = torch.bincount(cells, minlength=V**T).double()
    expected = joint.flatten() * len(ids)
    return float(((seen - expected) ** 2 / expected).sum())


def masks(rows: int, width: int = T) -> Tensor:
    return torch.full((rows, width), MASK)


ONE_BY_ONE = [
    ("ancestral", {"steps": 400, "grid": "linear"}),
    ("ancestral", {"steps": 600, "grid": "cosine"}),
    ("confidence", {"steps": T, "grid": "linear"}),
    ("confidence", {"steps": 200, "grid": "cosine"}),
    ("confidence", {"steps": T, "block_length": 1}),
    ("threshold", {"threshold": 1.0}),
    ("unroll", {}),
]
"""Settings that fill one token at a time, or nearly so: then the samples follow the model's joint distribution."""


@pytest.mark.parametrize(("sampler", "options"), ONE_BY_ONE, ids=str)
def test_filling_one_by_one_samples_the_joint_distribution(sampler: str, options: dict[str, Any]) -> None:
    joint = joint_of(1)
    out = denoise(Known(joint), masks(12000), sampler=sampler, seed=5, **options)
    assert chi_square(out.ids, joint) < 54


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "remask"])
def test_one_step_samples_every_position_by_itself(sampler: str) -> None:
    joint = joint_of(2)
    alone = [joint.sum([i for i in range(T) if i != place]) for place in range(T)]
    out = denoise(Known(joint), masks(12000), sampler=sampler, steps=1)
    assert out.forwards == 1
    assert chi_square(out.ids, torch.einsum("a,b,c->abc", *alone)) < 54
    assert chi_square(out.ids, joint) > 200, "the test tells the two apart"


def test_temperature_flattens_what_is_drawn() -> None:
    joint = independent(3)
    flat = joint.sqrt() / joint.sqrt().sum()
    out = denoise(Known(joint), masks(12000), sampler="confidence", steps=T, temperature=2.0)
    assert chi_square(out.ids, flat) < 54
    assert chi_square(out.ids, joint) > 200


def test_top_p_and_top_k_leave_the_unlikely_out() -> None:
    joint = independent(4)
    likely = [joint.sum([i for i in range(T) if i != place]).argsort(descending=True) for place in range(T)]
    model = Known(joint)
    for options, most in (({"top_k": 1}, 1), ({"top_k": 2}, 2), ({"top_p": 1e-6}, 1)):
        ids = denoise(model, masks(400), sampler="ancestral", **options).ids
        for place in range(T):
            assert set(ids[:, place].tolist()) == set(likely[place][:most].tolist())


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    joint = independent(5)
    best = [int(joint.sum([i for i in range(T) if i != place]).argmax()) for place in range(T)]
    for sampler in SAMPLERS:
        if sampler != "stream":
            out = denoise(Known(joint), masks(3), sampler=sampler, temperature=0.0, seed=9)
            assert out.ids.tolist() == [best] * 3


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for sampler in ("ancestral", "confidence", "threshold", "remask", "unroll"):
        yield sampler, {}
        yield sampler, {"steps": 1}
        yield sampler, {"steps": 2, "grid": "linear", "temperature": 0.0}
        yield sampler, {"threshold": 0.0}
        if sampler != "unroll":
            yield sampler, {"block_length": 1}
            yield sampler, {"block_length": 2, "steps": 7}


@pytest.mark.parametrize(("sampler", "options"), list(settings()), ids=str)
def test_no_mask_is_left_and_the_prompt_stays(sampler: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(len(sampler))
    ids = torch.randint(0, V + 1, (60, T), generator=generator)
    given = ids.clone()
    seen: list[Tensor] = []
    out = denoise(Known(joint_of(6)), ids, sampler=sampler, seed=3, on_step=seen.append, **options)
    assert not bool((out.ids == MASK).any())
    known = given != MASK
    assert torch.equal(out.ids[known], given[known])
    assert torch.equal(ids, given), "the caller's rows are not touched"
    assert len(seen) == out.steps == out.forwards
    for before, after in itertools.pairwise([given, *seen]):
        assert torch.equal(after[known], given[known])
        if sampler != "remask":
            assert torch.equal(after[before != MASK], before[before != MASK]), "what is filled stays"
    assert torch.equal(seen[-1], out.ids)


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "threshold", "remask", "unroll"])
def test_a_seed_repeats_itself_and_another_differs(sampler: str) -> None:
    def drawn(seed: int) -> Tensor:
        return denoise(Known(joint_of(7)), masks(40), sampler=sampler, steps=5, seed=seed).ids

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def counts(seen: list[Tensor]) -> list[list[int]]:
    """Masked tokens of each row after each step."""
    return [(ids == MASK).sum(1).tolist() for ids in seen]


class Wide:
    """Uniform over two tokens, surer of positions further right; rows of any length."""

    mask_id = MASK
    intervals: Intervals | None = None
    shifted = False
    forwards = 0

    def logits(self, input_ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
        self.forwards += 1
        place = (positions % input_ids.shape[1]).float()
        no = torch.full_like(place, -math.inf)
        return torch.stack((place / 100, torch.zeros_like(place), no, no), dim=1)


@pytest.mark.parametrize("grid", ["cosine", "linear"])
def test_confidence_keeps_as_many_masked_as_the_grid_says(grid: str) -> None:
    seen: list[Tensor] = []
    rows = torch.tensor([[MASK] * 20, [0] * 8 + [MASK] * 12])
    denoise(Wide(), rows, steps=5, grid=grid, on_step=seen.append)
    left = [math.cos(math.pi / 2 * i / 5) if grid == "cosine" else 1 - i / 5 for i in range(1, 6)]
    expected = [[math.ceil(n * share - 1e-9) for n in (20, 12)] for share in left[:-1]] + [[0, 0]]
    assert counts(seen) == [kept for kept in expected if kept != [20, 12]], (
        "a step that fills nothing is not run"
    )
    assert share_left(grid, 1.0) == 0.0, "exactly, or one position would stay masked"


def test_equal_steps_are_equal_whatever_the_rounding() -> None:
    seen: list[Tensor] = []
    denoise(Wide(), masks(1, 100), steps=10, grid="linear", on_step=seen.append)
    assert counts(seen) == [[n] for n in range(90, -1, -10)]


def test_the_surest_positions_come_first_and_blocks_from_the_left() -> None:
    seen: list[Tensor] = []
    denoise(Wide(), masks(1, 4), steps=4, grid="linear", on_step=seen.append)
    assert (seen[0] == MASK).tolist() == [[True, True, True, False]]
    seen.clear()
    denoise(Wide(), masks(1, 4), steps=4, grid="linear", block_length=2, on_step=seen.append)
    hidden = [(ids[0] == MASK).nonzero().flatten().tolist() for ids in seen]
    assert hidden == [[0, 2, 3], [2, 3], [2], []], "the blocks share the steps"
    assert denoise(Wide(), masks(1, 12), steps=6, grid="linear", block_length=4).forwards == 6


def test_blocks_count_the_gaps_of_each_row() -> None:
    rows = torch.tensor([[MASK, 0, MASK, 0, MASK, MASK], [0, 0, 0, 0, 0, MASK]])
    seen: list[Tensor] = []
    out = denoise(Wide(), rows, steps=2, block_length=2, on_step=seen.append)
    assert [(ids == MASK).nonzero().tolist() for ids in seen] == [[[0, 4], [0, 5]], []]
    assert out.block_length == 2


def test_threshold_fills_the_sure_ones_at_once_and_at_least_one() -> None:
    rows = masks(1, 100)
    sure = 1 / (1 + math.exp(-0.905))  # of position 90.5
    seen: list[Tensor] = []
    out = denoise(Wide(), rows, sampler="threshold", threshold=sure, on_step=seen.append)
    assert counts(seen)[:2] == [[91], [90]]
    assert out.forwards == 92
    assert denoise(Wide(), rows, sampler="threshold", threshold=0.0).forwards == 1


def test_remasking_takes_tokens_back_and_raises_their_likelihood() -> None:
    joint = joint_of(8)
    rows = masks(3000)
    seen: list[Tensor] = []
    out = denoise(Known(joint), rows, sampler="remask", steps=6, grid="linear", on_step=seen.append)
    back = [(before != MASK) & (after == MASK) for before, after in itertools.pairwise(seen)]
    assert any(bool(step.any()) for step in back)

    def likelihood(ids: Tensor) -> float:
        return float(joint[tuple(ids.T)].log().mean())

    assert likelihood(out.ids) > likelihood(denoise(Known(joint), rows, sampler="remask", steps=1).ids) + 0.1


def test_unroll_passes_once_per_interval_from_heavy_to_light() -> None:
    model = Known(joint_of(9))
    rows = torch.tensor([[MASK] * 3, [MASK, 0, MASK], [0, MASK, 1], [0, 1, 2]])
    seen: list[Tensor] = []
    out = denoise(model, rows, sampler="unroll", on_step=seen.append)
    assert counts(seen) == [[2, 2, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert model.asked == [1, 2, 3], "a row begins with the interval of its own share"
    assert [s[0] for s in model.shares] == pytest.approx([1, 2 / 3, 1 / 3])
    assert out.forwards == 3


def test_unroll_leaves_at_most_the_lower_share_masked() -> None:
    class Deep(Wide):
        intervals = Intervals((0.0, 0.15, 0.282, 0.531, 1.0))

    seen: list[Tensor] = []
    denoise(Deep(), masks(1, 40), sampler="unroll", on_step=seen.append)
    assert counts(seen) == [[math.floor(40 * r)] for r in (0.531, 0.282, 0.15, 0.0)]


def test_unroll_needs_intervals() -> None:
    with pytest.raises(ValueError, match="time_interpretation depth"):
        denoise(Wide(), masks(1), sampler="unroll")


def test_new_tokens_are_put_behind_the_prompt() -> None:
    rows = torch.tensor([[0, 1], [1, MASK]])
    out = denoise(Wide(), rows, max_new_tokens=5)
    assert out.ids.shape == (2, 7)
    assert out.ids[0, :2].tolist() == [0, 1]
    assert denoise(Wide(), torch.zeros(2, 0, dtype=torch.int64), max_new_tokens=3).ids.shape == (2, 3)


def test_padding_is_left_alone_also_where_it_holds_masks() -> None:
    rows = torch.tensor([[MASK, MASK, 1, MASK]])
    real = torch.tensor([[0, 0, 1, 1]])
    out = denoise(Wide(), rows, attention_mask=real, max_new_tokens=2)
    assert out.ids[0, :3].tolist() == [MASK, MASK, 1]
    assert not bool((out.ids[0, 3:] == MASK).any())
    with pytest.raises(ValueError, match="pad prompts on the left"):
        denoise(Wide(), rows, attention_mask=real.flip(1), max_new_tokens=2)


def test_nothing_to_fill_takes_no_pass() -> None:
    rows = torch.tensor([[0, 1, 2]])
    for sampler in ("ancestral", "confidence", "threshold", "remask", "unroll"):
        out = denoise(Known(joint_of(1)), rows, sampler=sampler)
        assert (out.forwards, out.steps) == (0, 0)
        assert torch.equal(out.ids, rows)


def test_the_result_says_what_it_took() -> None:
    out = denoise(Wide(), masks(1, 6), steps=3, grid="linear", seed=4)
    assert str(out) == "sampler confidence, 3 steps, block the whole length, seed 4, 3 forward passes"
    one = Denoised(out.ids, "threshold", 1, 8, 0, 1)
    assert str(one) == "sampler threshold, 1 step, block 8, seed 0, 1 forward pass"


def test_gumbel_noise_keeps_rare_tokens_as_likely_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rare = 2e-4
    logits = torch.tensor([[rare, 1 - rare]], dtype=torch.float64).log().expand(200_000, 2)
    drawn = int((gumbel_max(logits, generator) == 0).sum())
    assert abs(drawn - 40) < 4 * math.sqrt(40)
    kinds: list[Any] = []
    rand = torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *size, **given: kinds.append(given["dtype"]) or rand(*size, **given)
    )
    gumbel_max(logits[:1].float(), generator)
    assert kinds == [torch.float64]


def test_certainty_and_choice_of_positions() -> None:
    logits = torch.randn(700, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(certainty(logits), logits.double().softmax(-1).amax(-1), rtol=1e-12, atol=0)
    at = torch.tensor([[True, True, False, True], [True, False, False, False]])
    values = torch.tensor([0.2, 0.5, 0.5, 0.1], dtype=torch.float64)
    chosen = highest(values, at, torch.tensor([1, 3]))
    assert chosen.tolist() == [[False, True, False, False], [True, False, False, False]]


def test_damaged_weights_are_named_and_not_sampled() -> None:
    class Broken(Wide):
        def logits(self, input_ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
            return super().logits(input_ids, positions) * math.nan

    with pytest.raises(ValueError, match="not finite"):
        denoise(Broken(), masks(1))


WRONG = [
    ("sampler must be one of .*'confidense'; did you mean 'confidence'", {"sampler": "confidense"}),
    ("grid must be one of cosine, linear, got 'sine'", {"grid": "sine"}),
    ("steps must be at least 1, got 0", {"steps": 0}),
    ("block_length must be at least 1.* got 0", {"block_length": 0}),
    ("block_length cannot be set for unroll", {"sampler": "unroll", "block_length": 2}),
    ("threshold must be from 0 to 1, got 1.5", {"threshold": 1.5}),
    ("temperature must be 0 .* got nan", {"temperature": math.nan}),
    ("top_k must be 0 .* got -1; top_p must be above 0", {"top_k": -1, "top_p": 0.0}),
    ("max_new_tokens must be 0 or more, got -1", {"max_new_tokens": -1}),
    (r"attention_mask must be \[2, 3\]", {"attention_mask": torch.ones(2, 4)}),
]


@pytest.mark.parametrize(("message", "options"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_says_why(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        denoise(Known(joint_of(1)), masks(2), **options)
