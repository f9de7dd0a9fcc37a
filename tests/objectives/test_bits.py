"""Counter-based numbers: fixed by what they stand for, and as even as random numbers are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stackwise.objectives.bits import mix, scores, signed, uniforms

SHOW = (
    "import torch; from stackwise.objectives.bits import scores;"
    "print(scores({seed}, torch.arange(5) * 7, torch.full((5,), 3), 4, 'mask').tolist())"
)


def draw(samples: int, n: int, seed: int = 0, stream: str = "mask", pass_: int = 0) -> Tensor:
    ids = torch.arange(samples)
    return uniforms(seed, ids, torch.full_like(ids, pass_), n, stream)


def test_the_mixing_function_is_that_of_splitmix64() -> None:
    # The first outputs of the published generator from state 1234567, whose increment is the golden number.
    golden, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state += golden
        outputs.append(int(mix(torch.tensor(signed(state)))) % 2**64)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_sample_draws_the_same_in_any_batch_order_and_length() -> None:
    ids, draws = torch.randint(0, 10**12, (40,)), torch.randint(0, 9, (40,))
    whole = scores(5, ids, draws, 64, "mask")
    order = torch.randperm(40)
    assert torch.equal(scores(5, ids[order], draws[order], 64, "mask"), whole[order])
    parts = [scores(5, i, d, 64, "mask") for i, d in zip(ids.split(7), draws.split(7), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(scores(5, ids, draws, 20, "mask"), whole[:, :20])


def test_another_process_draws_the_same() -> None:
    seed = int(torch.randint(0, 10**6, ()))
    there = subprocess.run([sys.executable, "-c", SHOW.format(seed=seed)], capture_output=True, text=True)
    ids = torch.arange(5) * 7
    here = scores(seed, ids, torch.full_like(ids, 3), 4, "mask").tolist()
    assert there.stdout.strip() == str(here), there.stderr


def test_neither_reads_nor_moves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    first = draw(3, 3)
    torch.manual_seed(99)
    assert torch.equal(draw(3, 3), first)
    torch.set_rng_state(before)
    draw(3, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": "bert"}, {"pass_": 1}])
def test_seed_stream_and_draw_each_give_other_numbers(other: dict) -> None:
    a, b = draw(400, 50), draw(400, 50, **other)
    assert not (a == b).any()
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03


def test_uniforms_are_even_in_each_bin_and_unrelated_between_neighbours() -> None:
    u = draw(500, 400)
    assert 0 <= float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u, bins=50, min=0, max=1)
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 90  # chi-square, 49 degrees: 85.4 at p = 0.001
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.01


def test_scores_are_never_negative_and_stay_below_two_to_the_62() -> None:
    ids = torch.randint(-(2**62), 2**62, (1000,))
    values = scores(-3, ids, ids, 100, "mask")
    assert int(values.min()) >= 0
    assert 2**61 < int(values.max()) < 2**62


def test_sample_ids_and_draws_must_be_one_per_sample() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        scores(0, torch.arange(3), torch.arange(2), 4, "mask")
