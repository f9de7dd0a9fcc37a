"""Eight-bit moments and bf16 weights without a master, number by number."""

from __future__ import annotations

import pytest
import torch

from stackwise.training import adam8bit
from stackwise.training.adam8bit import Adam8bit
from stackwise.training.eightbit import BLOCK, dequantise, dynamic_map, quantise, scale_count
from stackwise.training.muon import Muon
from stackwise.training.rounding import Rounding, round_stochastically


def numbers(count: int) -> torch.Tensor:
    """Numbers of seven decades, of either sign, in another order of magnitude every few blocks."""
    x = torch.randn(count) * 10 ** (-7 * torch.rand(count) ** 2)
    return x * 10 ** torch.randint(-3, 3, (scale_count(count), 1)).repeat(1, BLOCK).flatten()[:count].float()


def there_and_back(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(len(x), dtype=torch.uint8)
    scales = torch.empty(scale_count(len(x)))
    quantise(x.clone(), codes, scales, signed=signed)
    return dequantise(codes, scales, signed=signed), scales


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_every_number_becomes_the_nearest_of_the_map_in_its_block(signed, count):
    x = numbers(count) if signed else numbers(count).abs()
    back, scales = there_and_back(x, signed)
    values = dynamic_map(signed).double()
    for block, (part, got) in enumerate(zip(x.split(BLOCK), back.split(BLOCK), strict=True)):
        top = part.abs().max().double()
        assert scales[block] == top
        share = part.double() / top
        best = (share[:, None] - values).abs().min(1).values
        error = (got.double() / top - share).abs()
        tolerance = share.abs() * 2**-11 + 1e-7  # the width of a cell of the search table
        if not signed:
            tolerance += (share < values[1]) * values[1]  # what would be 0 is the least there is
        assert (error <= best + tolerance).all()


def test_the_relative_error_of_the_large_numbers_of_a_block_is_small():
    x = torch.randn(100 * BLOCK)
    for signed, bound in ((True, 0.08), (False, 0.04)):
        given = x if signed else x.abs()
        back, scales = there_and_back(given, signed)
        large = given.abs() > 0.1 * scales.repeat_interleave(BLOCK)
        assert ((back - given)[large] / given[large]).abs().max() < bound
        assert (back - given).abs().mean() < 0.02 * given.abs().mean()


def test_zeros_stay_zero_and_no_second_moment_vanishes():
    assert there_and_back(torch.zeros(300), True)[0].abs().max() == 0
    x = 10.0 ** torch.linspace(-30, 0, 256)
    back, _ = there_and_back(x, False)
    assert (back > 0).all()
    assert there_and_back(torch.cat((x[:255], torch.zeros(1))), False)[0][-1] == 0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_gives_one_of_the_two_neighbours_and_leaves_bf16_numbers_alone():
    x = numbers(10_001)
    rounded = round_stochastically(x.clone(), generator())
    assert rounded.dtype == torch.bfloat16
    below = (x.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    above = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded.float() == below) | (rounded.float() == above)).all()
    assert (rounded.float() != x.bfloat16().float()).any()
    exact = x.bfloat16()
    assert torch.equal(round_stochastically(exact.float(), generator()), exact)


def test_rounding_is_unbiased():
    """Each of 64 numbers 40,000 times: the mean is within five standard errors of the number."""
    draws = 40_000
    x = torch.randn(64, generator=generator(4))
    rounded = round_stochastically(x.repeat(draws), generator(3)).double().view(draws, 64)
    error = (rounded.mean(0) - x.double()).abs()
    widest = x.abs() * 2**-7  # no two neighbours are further apart
    assert (error < 5 * 0.5 * widest / draws**0.5).all()
    assert error.mean() < 0.1 * (x.bfloat16().float() - x).abs().mean()


def test_bits_depend_on_seed_step_and_name_alone():
    weights = [torch.zeros(3), torch.zeros(3)]

    def bits(seed: int, step: int, name: str) -> list[int]:
        rounding = Rounding({weights[0]: name, weights[1]: "other"}, seed)
        rounding.step = step
        torch.rand(7)  # the global state takes no part
        return torch.randint(0, 1000, (8,), generator=rounding.generator(weights[0])).tolist()

    first = bits(1, 2, "a")
    assert first == bits(1, 2, "a")
    assert first not in (bits(2, 2, "a"), bits(1, 3, "a"), bits(1, 2, "b"))


def pair(shape, dtype=torch.float32):
    value = torch.randn(shape).to(dtype)
    return torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.float().clone())


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_first_step_is_that_of_adam_to_the_last_digits(decoupled):
    """Moments are stored in eight bits after they are used."""
    ours, theirs = pair((70, 65))
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    a = Adam8bit([ours], decoupled=decoupled, **options)
    b = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], **options)
    ours.grad = theirs.grad = torch.randn(70, 65)
    a.step()
    b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_many_steps_are_the_formula_with_moments_rounded_in_between():
    ours, reference = pair((300, 31))
    w = reference.detach().double()
    m = v = torch.zeros_like(w)
    adam = Adam8bit([ours], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        ours.grad = torch.randn(300, 31) * 10 ** (-3 * torch.rand(300, 31))
        g = ours.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        adam.step()
        m = there_and_back(m.float().flatten(), True)[0].view_as(m).double()
        v = there_and_back(v.float().flatten(), False)[0].view_as(v).double()
    off = (ours.double() - w).abs()
    assert off.median() < 1e-6
    assert (off > 1e-3).double().mean() < 0.01  # a moment next to a middle may have gone the other way


def test_pieces_do_not_show(monkeypatch):
    results = []
    for size in (2 * BLOCK, 2**18):
        monkeypatch.setitem(adam8bit.PIECES, "cpu", size)
        torch.manual_seed(5)
        p, _ = pair((90, 61), torch.bfloat16)
        adam = Adam8bit([p], rounding=Rounding({p: "p"}, 0))
        for _ in range(3):
            p.grad = torch.randn(90, 61).bfloat16()
            adam.step()
        results.append((p.detach().clone(), adam.state[p]["exp_avg"].clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_kernels_of_bitsandbytes_do_the_same_update(monkeypatch, decoupled):
    pytest.importorskip("bitsandbytes")
    grads = [torch.randn(80, 64) for _ in range(4)]
    start = torch.randn(80, 64)
    results = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(adam8bit, "KERNEL_DEVICES", devices)
        p = torch.nn.Parameter(start.clone())
        adam = Adam8bit([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.2, decoupled=decoupled)
        for grad in grads:
            p.grad = grad.clone()
            adam.step()
        results.append((p.detach() - start, adam.state[p]))
    (ours, held), (theirs, their_state) = results
    assert (ours - theirs).abs().mean() < 0.01 * theirs.abs().mean()
    assert held.keys() == their_state.keys()
    for key, value in held.items():
        assert value.shape == their_state[key].shape
    difference = held["exp_avg"].int() - their_state["exp_avg"].int()
    assert difference.abs().float().mean() < 0.5


def test_bytes_are_two_per_number_and_eight_per_block():
    p, _ = pair((130, 33))
    adam = Adam8bit([p])
    p.grad = torch.ones_like(p)
    adam.step()
    held = sum(t.nbytes for t in adam.state[p].values())
    assert held == 2 * 130 * 33 + 8 * scale_count(130 * 33) + 4


@pytest.mark.parametrize("make", [Adam8bit, lambda p, **k: Muon(p, eight_bit=True, **k)])
def test_without_a_master_the_weights_follow_the_fp32_ones_on_average(make):
    """A hundred copies with their own bits: updates of a twentieth of a step of bf16 add up as they do in fp32."""
    copies, shape = 100, (8, 64)
    start = torch.randn(shape).bfloat16()
    wide = torch.nn.Parameter(start.float())
    narrow = [torch.nn.Parameter(start.clone()) for _ in range(copies)]
    rounding = Rounding({p: str(i) for i, p in enumerate(narrow)}, 0)
    a, b = make([wide], lr=2e-4), make(narrow, lr=2e-4, rounding=rounding)
    for step in range(10):
        rounding.step = step
        wide.grad = torch.randn(shape).bfloat16().float()
        for p in narrow:
            p.grad = wide.grad.bfloat16()
        a.step()
        b.step()
    moved = wide.detach() - start.float()
    seen = torch.stack([p.detach().float() for p in narrow]).mean(0) - start.float()
    assert moved.abs().mean() < 0.2 * 2**-8  # rounded to the nearest, next to nothing would move
    assert (seen * moved).sum() / (moved * moved).sum() == pytest.approx(1.0, abs=0.15)


def test_muon_in_eight_bits_follows_muon():
    ours, theirs = pair((64, 96))
    a, b = Muon([ours], lr=0.1, eight_bit=True), Muon([theirs], lr=0.1)
    start = ours.detach().clone()
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(64, 96)
        a.step()
        b.step()
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()
    assert a.state[ours]["momentum_buffer"].dtype == torch.uint8
    assert sum(t.nbytes for t in a.state[ours].values()) == 64 * 96 + 4 * 24


def test_parameters_that_cannot_be_updated_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        Adam8bit([torch.nn.Parameter(torch.zeros(4, 6).t())])
    with pytest.raises(ValueError, match="bfloat16 with rounding"):
        Adam8bit([torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))])
