"""The public masking objects: by stack, by time step, by time."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise import ConfigError, NoiseSchedule, ProgressiveMasking, StackWiseConfig, TimeStepMasking

Batch = dict[str, Tensor]


def config_of(
    objective: dict[str, Any] | None = None, vocab_size: int | None = 60, **keys: Any
) -> StackWiseConfig:
    keys = {"building_mode": "prepend", "training_objective": "mlm", "target_stacks": 4, **keys}
    data = {
        "model": {"vocab_size": vocab_size},
        "objective": objective or {},
        "training": {"progressive": keys},
    }
    config = StackWiseConfig()
    for section, values in (("model", data["model"]), ("objective", data["objective"])):
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    for name, value in keys.items():
        setattr(config.training.progressive, name, value)
    return config


def batch_of(rows: int = 8, length: int = 50) -> Batch:
    ids = torch.randint(3, 60, (rows, length))
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "sample_ids": torch.randint(0, 10**9, (rows,)),
    }


def rows_of(batch: Batch, index: Tensor) -> Batch:
    return {name: field[index] for name, field in batch.items()}


# --- stacks and steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "steps"), [("prepend", [0, 100, 200, 300]), ("append", [300, 200, 100, 0])])
def test_every_stack_owns_as_many_steps(mode: str, steps: list[int]) -> None:
    masking = TimeStepMasking(config_of(building_mode=mode))
    assert [masking.get_time_step_for_stack(b) for b in range(4)] == steps


@pytest.mark.parametrize("mapping", ["linear", "exponential"])
@pytest.mark.parametrize("mode", ["prepend", "append"])
def test_intervals_are_disjoint_and_cover_all_noise(mode: str, mapping: str) -> None:
    masking = TimeStepMasking(config_of(building_mode=mode, stack_time_mapping=mapping))
    owned = [masking.get_interval_for_stack(b) for b in range(4)]
    edges = owned if mode == "prepend" else owned[::-1]
    assert edges[0][0] == 0
    assert edges[-1][1] == 1
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in pairwise(edges))


def test_a_stack_beyond_the_last_is_an_index_error() -> None:
    masking = TimeStepMasking(config_of())
    for call in (masking.get_time_step_for_stack, masking.get_interval_for_stack):
        with pytest.raises(IndexError, match="stack 99 is outside 0 to 3"):
            call(99)
    with pytest.raises(IndexError, match="target_stacks"):
        masking.generate_masks_for_stack(batch_of(), 4)


def test_without_target_stacks_the_limit_counts() -> None:
    masking = TimeStepMasking(config_of(target_stacks=None, max_stacks=7))
    assert masking.n_stacks == 7
    assert masking.horizon == 700


def test_a_map_of_ones_own_sets_steps_and_intervals() -> None:
    masking = TimeStepMasking(config_of(), time_mapping=lambda b, n, steps: steps * b * b // (n * n))
    assert [masking.get_time_step_for_stack(b) for b in range(4)] == [0, 25, 100, 225]
    assert masking.get_interval_for_stack(2) == (0.25, 0.5625)
    with pytest.raises(ConfigError, match="not monotone"):
        TimeStepMasking(config_of(), time_mapping=lambda b, n, steps: 100 * (b % 3))
    with pytest.raises(ConfigError, match="a gap"):
        TimeStepMasking(config_of(), time_mapping=lambda b, n, steps: 100 * b + 1)


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlm", "diffusion"])
@pytest.mark.parametrize("form", ["count", "t"])
def test_a_stack_is_masked_at_the_shares_of_its_widened_interval(name: str, form: str) -> None:
    config = config_of({"form": form}, training_objective=name, time_overlap=0.1)
    masking = TimeStepMasking(config)
    batch = {"input_ids": torch.randint(0, 60, (600, 200)), "sample_ids": torch.arange(600)}
    shares = masking.generate_masks_for_stack(batch, 1).double().mean(1)
    slack = 0.005 if form == "count" or name == "mlm" else 0.15  # single tokens vary
    assert 0.225 - slack < float(shares.min()) < 0.235
    assert 0.52 < float(shares.max()) <= 0.525 + slack
    assert float(shares.mean()) == pytest.approx(0.375, abs=0.005)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_the_masked_share_at_a_time_is_that_of_the_schedule(schedule: str) -> None:
    masking = TimeStepMasking(config_of({"noise_schedule": schedule}, time_interpretation="input"))
    batch = {"input_ids": torch.randint(0, 60, (100, 1000))}
    for t in (0.2, 0.5, 0.83, 1.0):
        rate = NoiseSchedule(schedule).rate(t)
        assert masking.mask_ratio(t) == rate
        masks = masking.generate_masks_for_time_step(batch, t)
        assert float(masks.double().mean()) == pytest.approx(rate, rel=0.02)


def test_15_percent_of_100k_positions_and_never_special_or_padding() -> None:
    masking = TimeStepMasking(config_of(time_step_mask_fractions=[0.15], target_stacks=1), special_ids=(1, 2))
    ids = torch.randint(3, 60, (250, 500))
    ids[:, 0], ids[:, 100:] = 1, torch.where(torch.rand(250, 400) < 0.1, 2, ids[:, 100:])
    mask = torch.ones_like(ids)
    mask[:, 480:] = 0
    masks = masking.generate_masks_for_stack({"input_ids": ids, "attention_mask": mask}, 0)
    eligible = (ids > 2) & mask.bool()
    assert not (masks & ~eligible).any()
    assert int(eligible.sum()) > 100_000
    assert float(masks.sum() / eligible.sum()) == pytest.approx(0.15, abs=0.001)


def test_a_short_row_has_at_least_one_masked_token_and_an_empty_one_none() -> None:
    masking = TimeStepMasking(config_of(time_step_mask_fractions=[0.15]))
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 0, 0], [0, 0, 0]])}
    batch["attention_mask"] = batch["input_ids"] > 0
    assert masking.generate_masks_for_stack(batch, 0).sum(1).tolist() == [1, 1, 0]


def test_masks_are_the_same_in_any_batch_and_order() -> None:
    masking, batch = TimeStepMasking(config_of()), batch_of(24)
    whole = masking.generate_masks_for_stack(batch, 2)
    order = torch.randperm(24)
    assert torch.equal(masking.generate_masks_for_stack(rows_of(batch, order), 2), whole[order])
    parts = [masking.generate_masks_for_stack(rows_of(batch, i), 2) for i in order.split(5)]
    assert torch.equal(torch.cat(parts), whole[order])
    again = TimeStepMasking(config_of()).generate_masks_for_stack(batch, 2)
    assert torch.equal(again, whole)


def test_masks_are_the_same_in_another_process() -> None:
    program = (
        "import torch; from stackwise import *; c = StackWiseConfig(); p = c.training.progressive;"
        "p.training_objective, p.building_mode, p.target_stacks = 'mlm', 'prepend', 4;"
        "ids = torch.arange(60).view(3, 20);"
        "print(TimeStepMasking(c).generate_masks_for_stack({'input_ids': ids}, 1).long().tolist())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    masking = TimeStepMasking(config_of(vocab_size=None))
    here = masking.generate_masks_for_stack({"input_ids": torch.arange(60).view(3, 20)}, 1)
    assert there.stdout.strip() == str(here.long().tolist()), there.stderr


def test_draws_differ_and_come_again_after_as_many_as_there_are() -> None:
    masking, batch = TimeStepMasking(config_of({"mask_draws": 3})), batch_of()
    seen = [masking.generate_masks_for_stack({**batch, "draws": torch.full((8,), n)}, 1) for n in range(6)]
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(seen[n], seen[n + 3]) for n in range(3))


def test_more_time_only_adds_to_the_mask_unless_nesting_is_off() -> None:
    batch = batch_of()
    for nested in (True, False):
        masking = TimeStepMasking(config_of({"nested_masks": nested}))
        masks = [masking.generate_masks_for_time_step(batch, step) for step in range(9, 400, 30)]
        inside = [not (a & ~b).any() for a, b in pairwise(masks)]
        assert all(inside) is nested


def test_a_time_of_its_own_for_each_row() -> None:
    masking, batch = TimeStepMasking(config_of(time_interpretation="input")), batch_of(3)
    t = torch.tensor([0.2, 0.9, 0.5])
    masks = masking.generate_masks_for_time_step(batch, t)
    for i in range(3):
        one = masking.generate_masks_for_time_step(batch, float(t[i]))
        assert torch.equal(masks[i], one[i])
    with pytest.raises(ValueError, match=r"one time or \[3\]"):
        masking.generate_masks_for_time_step(batch, t[:2])


def test_masks_of_a_shifted_objective_are_where_tokens_are_hidden() -> None:
    masking, batch = TimeStepMasking(config_of({"target_shift": True})), batch_of()
    masks = masking.generate_masks_for_time_step(batch, 399)
    assert torch.equal(masks[:, 1:], batch["attention_mask"][:, 1:].bool())
    assert not masks[:, 0].any()


# --- corruption ----------------------------------------------------------------------------------------------------


def test_depth_replaces_every_chosen_token_by_the_mask() -> None:
    masking, batch = TimeStepMasking(config_of()), batch_of()
    masks = masking.generate_masks_for_stack(batch, 3)
    out = masking.corrupt(batch["input_ids"], masks)
    assert torch.equal(out, batch["input_ids"].masked_fill(masks, 60))  # a new row behind the vocabulary
    named = TimeStepMasking(config_of({"mask_token_id": 2}))
    assert bool((named.corrupt(batch["input_ids"], masks)[masks] == 2).all())


def test_bert_corruption_is_80_10_10_by_sample() -> None:
    masking = TimeStepMasking(config_of({"corruption": "bert"}), special_ids=(0,))
    ids, sample_ids = torch.randint(1, 60, (100, 1000)), torch.randperm(100)
    masks = torch.ones_like(ids, dtype=torch.bool)
    out = masking.corrupt(ids, masks, sample_ids)
    shares = [float(x.double().mean()) for x in (out == 60, (out != 60) & (out != ids), out == ids)]
    assert shares == pytest.approx([0.8, 0.1 * 58 / 59, 0.1 + 0.1 / 59], abs=0.01)
    assert int(out.min()) > 0
    order = torch.randperm(100)
    assert torch.equal(masking.corrupt(ids[order], masks, sample_ids[order]), out[order])
    assert not torch.equal(masking.corrupt(ids, masks, sample_ids, torch.ones(100).long()), out)


def test_what_cannot_be_corrupted_says_why() -> None:
    batch = batch_of()
    masks = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    for config in (config_of(vocab_size=None), config_of({"add_mask_token": False})):
        with pytest.raises(ConfigError, match=r"objective\.mask_token_id"):
            TimeStepMasking(config).corrupt(batch["input_ids"], masks)
    with pytest.raises(ValueError, match="embeddings"):
        TimeStepMasking(config_of({"corruption": "gaussian"})).corrupt(batch["input_ids"], masks)
    with pytest.raises(ConfigError, match="masks nothing"):
        TimeStepMasking(config_of(training_objective="clm")).generate_masks_for_stack(batch, 0)
    with pytest.raises(KeyError, match="input_ids"):
        TimeStepMasking(config_of()).generate_masks_for_stack({}, 0)


# --- time as input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stratified", "antithetic"])
def test_10k_sampled_steps_are_flat_with_the_top_bin(kind: str) -> None:
    config = config_of({"t_sampling": kind}, time_interpretation="input", num_time_steps=20)
    masking = TimeStepMasking(config)
    batch = {"input_ids": torch.zeros(10_000, 1), "sample_ids": torch.arange(10_000)}
    t = masking.sample_time(batch)
    steps = masking.step_of(t)
    slack = 25 if kind == "stratified" else 90
    assert float((torch.bincount(steps, minlength=20) - 500).abs().max()) <= slack
    assert masking.step_of(torch.tensor([1e-9, 0.05, 1.0])).tolist() == [0, 1, 19]


def test_a_batch_may_share_one_time() -> None:
    batch = batch_of()
    apart = TimeStepMasking(config_of(time_interpretation="input")).sample_time(batch)
    together = TimeStepMasking(config_of(time_interpretation="input", time_sampling="batch")).sample_time(
        batch
    )
    assert len(apart.unique()) == 8
    assert together.tolist() == [float(apart[0])] * 8


def test_input_mode_has_no_stacks_and_points_to_sample_time() -> None:
    masking = TimeStepMasking(config_of(time_interpretation="input"))
    calls = (
        lambda: masking.get_time_step_for_stack(0),
        lambda: masking.get_interval_for_stack(0),
        lambda: masking.generate_masks_for_stack(batch_of(), 0),
    )
    for call in calls:
        with pytest.raises(ValueError, match="sample_time"):
            call()
    with pytest.raises(ConfigError, match="time_step_mask_fractions"):
        TimeStepMasking(config_of(time_interpretation="input", time_step_mask_fractions=[0.2]))
    with pytest.raises(ConfigError, match="time_mapping"):
        TimeStepMasking(config_of(time_interpretation="input"), time_mapping=lambda b, n, steps: b)


def test_times_outside_are_refused() -> None:
    for mode in ("depth", "input"):
        masking = TimeStepMasking(config_of(time_interpretation=mode))
        for wrong in (0.0, 1.5, -0.1):
            with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
                masking.mask_ratio(wrong)
        for step in (-1, 400):
            with pytest.raises(ValueError, match="0 to 399"):
                masking.mask_ratio(step)
    assert masking.mask_ratio(399) == 1.0


def test_auto_means_depth_and_none_is_refused() -> None:
    assert TimeStepMasking(config_of(building_mode="append")).interpretation == "depth"
    with pytest.raises(ConfigError, match="auto, depth, input"):
        TimeStepMasking(config_of(time_interpretation="none"))


# --- point masks ---------------------------------------------------------------------------------------------------


def test_progressive_masking_is_the_schedule_of_point_masks() -> None:
    masking = ProgressiveMasking(config_of())
    steps = [masking.get_time_step_for_stack(b) for b in range(4)]
    assert [masking.mask_ratio(step) for step in steps] == pytest.approx([0.15, 0.40, 0.65, 0.90])
    batch = {"input_ids": torch.randint(0, 60, (5, 100))}
    assert masking.generate_masks_for_stack(batch, 2).sum(1).tolist() == [65] * 5
    assert masking.mask_ratio(0.6) == pytest.approx(0.65)  # step 240 of 400
    with pytest.raises(ConfigError, match="not of ProgressiveMasking"):
        ProgressiveMasking(config_of(time_step_mask_fractions=[0.1, 0.5]))


def test_point_masks_own_no_interval() -> None:
    with pytest.raises(ValueError, match="no bound"):
        ProgressiveMasking(config_of()).get_interval_for_stack(0)


def test_a_point_mask_of_everything_warns() -> None:
    with pytest.warns(UserWarning, match="no token at all"):
        TimeStepMasking(config_of(time_step_mask_fractions=[0.2, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TimeStepMasking(config_of(time_step_mask_fractions=[0.2, 0.9]))


def test_the_configuration_given_is_left_alone() -> None:
    config = config_of()
    before = config.to_dict()
    ProgressiveMasking(config).generate_masks_for_stack(batch_of(), 0)
    assert config.to_dict() == before
