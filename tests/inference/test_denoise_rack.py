"""Sampling from racks: padding, prompts, routing by the share of masks, and one sweep through the stacks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.inference.denoise import denoise
from stackwise.inference.samplers import SAMPLERS
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import Denoiser
from stackwise.objectives.intervals import Intervals

V = 23
MASK = 22


def rack_of(n_stacks: int = 3, **options: Any) -> Rack:
    """A bidirectional rack whose parameters all differ from their neutral start."""
    options = {"attention_preset": "bert_style", "max_seq_len": 48, **options}
    rack = create_simple_rack(n_stacks, 1, 16, 24, 4, V, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rack.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return rack


def denoiser_of(rack: Rack, path: str = "rack", **options: Any) -> Denoiser:
    return Denoiser(rack, MASK, intervals=Intervals.linear(len(rack.stacks)), path=path, **options)


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", ["rack", "alone", "suffix", "prefix"])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_fills_every_path(sampler: str, path: str) -> None:
    rows = prompts(4, 12)
    gaps = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    rows = rows.masked_fill(gaps, MASK)
    denoiser = denoiser_of(rack_of(), path, banned=(20, 21))
    for seed in range(3):
        out = denoise(denoiser, rows, sampler=sampler, steps=6, seed=seed, temperature=3.0)
        assert torch.equal(out.ids[~gaps], rows[~gaps])
        assert int(out.ids[gaps].max()) < 20, "neither a mask nor a banned token is drawn"
        assert torch.equal(
            out.ids, denoise(denoiser, rows, sampler=sampler, steps=6, seed=seed, temperature=3.0).ids
        )


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_padded_row_is_filled_as_by_itself(sampler: str) -> None:
    rack = rack_of(use_rope=False)  # learned positions: where a row begins is seen
    denoiser = denoiser_of(rack, "suffix")
    rows, real = prompts(3, 9), torch.ones(3, 9, dtype=torch.bool)
    for row, length in enumerate((9, 5, 2)):
        real[row, : 9 - length] = False
    options: dict[str, Any] = {"sampler": sampler, "steps": 40, "temperature": 0.0, "max_new_tokens": 6}
    if sampler == "ancestral":
        options["steps"] = 1  # its random order differs from row to row
    together = denoise(denoiser, rows, attention_mask=real, **options).ids
    for row, length in enumerate((9, 5, 2)):
        alone = denoise(denoiser, rows[row : row + 1, 9 - length :], **options).ids
        assert together[row, 9 - length :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("path", ["alone", "suffix", "prefix"])
def test_each_step_runs_the_stacks_that_own_the_share(path: str) -> None:
    rack = rack_of(4)
    ran: list[tuple[int, ...]] = []
    denoiser = denoiser_of(rack, path)
    for position, stack in enumerate(rack.stacks):
        stack.blocks[0].register_forward_pre_hook(lambda *_, p=position: ran.append(p))
    rows = torch.full((1, 8), MASK)
    denoise(denoiser, rows, sampler="threshold", threshold=1.0)
    owners = [
        math.ceil(n / 8 * 4) - 1 for n in range(8, 0, -1)
    ]  # distance from the head, both sides of each boundary
    spans = {"alone": lambda p: [p], "suffix": lambda p: range(p, 4), "prefix": lambda p: range(p + 1)}
    assert ran == [p for d in owners for p in spans[path](3 - d)]
    ran.clear()
    out = denoise(denoiser, rows, sampler="unroll")
    assert ran == [p for d in (3, 2, 1, 0) for p in spans[path](3 - d)]
    assert out.forwards == 4
    ran.clear()
    out = denoise(denoiser, rows, sampler="stream")
    assert ran == [0, 1, 2, 3]
    assert (out.forwards, out.steps) == (1, 4)


def test_a_stream_begins_with_the_stack_of_the_row_and_embeds_what_it_fills() -> None:
    rack = rack_of(3)
    denoiser = denoiser_of(rack, "alone")
    rows = torch.stack((torch.full((6,), MASK), torch.cat((prompts(1, 3)[0], torch.full((3,), MASK)))))
    out = denoise(denoiser, rows, sampler="stream", temperature=0.0)
    for row, first in ((0, 0), (1, 1)):
        ids = rows[row : row + 1].clone()
        x = rack.look_up(ids)
        for position in range(first, 3):
            with torch.no_grad():
                x = rack.forward_from_stack(x, position, position + 1)
                logits = rack.head(rack.norm(x))[0]
            logits[:, MASK] = -math.inf
            sure = logits.double().softmax(-1).amax(-1).masked_fill(ids[0] != MASK, -1)
            left = math.floor(6 * (2 - position) / 3 + 1e-9)
            chosen = sure.topk(int((ids == MASK).sum()) - left).indices
            ids[0, chosen] = logits[chosen].argmax(-1)
            x = x.clone()
            x[0, chosen] = rack.look_up(ids)[0, chosen]
        assert out.ids[row].tolist() == ids[0].tolist()


def test_with_one_stack_unroll_and_stream_are_one_pass_that_fills_everything() -> None:
    denoiser = denoiser_of(rack_of(1), "suffix")
    rows = torch.full((2, 10), MASK)
    one = denoise(denoiser, rows, steps=1, seed=3)
    for sampler in ("unroll", "stream"):
        out = denoise(denoiser, rows, sampler=sampler, seed=3)
        assert torch.equal(out.ids, one.ids)
        assert out.forwards == 1


def test_a_shifted_rack_predicts_at_the_position_before() -> None:
    rack = rack_of(2)
    rows = prompts(1, 6)
    rows[0, 3] = MASK
    out = denoise(Denoiser(rack, MASK, shifted=True), rows, temperature=0.0)
    with torch.no_grad():
        logits = rack(rows)[0, 2]
    logits[MASK] = -math.inf
    assert int(out.ids[0, 3]) == int(logits.argmax())
    with pytest.raises(ValueError, match="first token of a row"):
        denoise(Denoiser(rack, MASK, shifted=True), torch.full((1, 3), MASK))


def test_rack_denoise_is_the_same_call_and_leaves_the_rack_as_it_was() -> None:
    rack = rack_of(dropout=0.5).train()
    rack.stacks[0].freeze_all()
    modes = [module.training for module in rack.modules()]
    rows = prompts(2, 5).int()
    done = rack.denoise(rows, mask_id=MASK, max_new_tokens=7, seed=4, banned=(0,))
    assert [module.training for module in rack.modules()] == modes
    same = denoise(Denoiser(rack.eval(), MASK, banned=(0,)), rows, max_new_tokens=7, seed=4)
    assert torch.equal(done.ids, same.ids)
    assert done.forwards == same.forwards
    assert done.ids.shape == (2, 12)


def test_rack_denoise_routes_by_intervals_where_they_are_given() -> None:
    rack, rows = rack_of(), torch.full((2, 9), MASK)
    by_call = rack.denoise(rows, mask_id=MASK, intervals=Intervals.linear(3), path="alone", sampler="unroll")
    assert torch.equal(by_call.ids, denoise(denoiser_of(rack, "alone"), rows, sampler="unroll").ids)
    assert by_call.forwards == 3


def test_the_rack_is_left_as_it_was_also_by_an_error() -> None:
    rack = rack_of().train()

    def fail(ids: Tensor) -> None:
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        rack.denoise(prompts(1, 4), mask_id=MASK, max_new_tokens=3, on_step=fail)
    assert all(module.training for module in rack.modules())


def test_a_causal_rack_is_sent_to_the_other_call() -> None:
    rack = create_simple_rack(1, 1, 16, 24, 4, V, attention_preset="gpt_style")
    with pytest.raises(ValueError, match="generate"):
        rack.denoise(prompts(1, 4), mask_id=MASK, max_new_tokens=2)


def test_wrong_ids_and_damaged_weights_are_named() -> None:
    rack = rack_of()
    with pytest.raises(TypeError, match="integers"):
        rack.denoise(prompts(1, 4).float(), mask_id=MASK)
    with pytest.raises(IndexError, match="token id 23"):
        rack.denoise(torch.tensor([[1, 23]]), mask_id=MASK)
    with pytest.raises(IndexError, match="mask_id 23 is outside the vocabulary of 23"):
        rack.denoise(prompts(1, 4), mask_id=23)
    with pytest.raises(ValueError, match="more than max_seq_len = 48"):
        rack.denoise(prompts(1, 4), mask_id=MASK, max_new_tokens=45)
    for sampler in ("unroll", "stream"):
        with pytest.raises(ValueError, match="owns an interval"):
            rack.denoise(prompts(1, 4), mask_id=MASK, max_new_tokens=2, sampler=sampler)
    with torch.no_grad():
        rack.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        rack.denoise(prompts(1, 4), mask_id=MASK, max_new_tokens=2)
