"""Depth as time in the curricula: which noise each stage trains on and is scored on."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch

from stackwise import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise.config.errors import ConfigError
from stackwise.config.objective_rules import label_of
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.stage import Stage
from stackwise.objectives.masked import Masked
from stackwise.training import loop
from stackwise.training.run import train


@pytest.fixture
def config(tiny):
    def make(mode: str = "independent", **changes) -> StackWiseConfig:
        return tiny(
            **{
                "model__attention_preset": "bert_style",
                "training__max_steps": 2,
                "training__progressive__training_objective": "diffusion",
                "training__progressive__time_interpretation": "depth",
                "training__progressive__building_mode": mode,
                "training__progressive__joint_tuning": False,
                **changes,
            }
        )

    return make


@pytest.mark.parametrize("mode", ["independent", "prepend", "append"])
def test_scored_ranges_cover_all_noise_once_and_trained_ones_reach_beyond(config, mode):
    listed = stages(config(mode, training__progressive__time_overlap=0.2))
    scored = sorted(stage.eval_noise for stage in listed)
    assert scored[0][0] == 0
    assert scored[-1][1] == 1
    assert all(a[1] == b[0] for a, b in pairwise(scored))
    for stage in listed:
        (lo, hi), (low, high) = stage.noise, stage.eval_noise
        more = 0.2 * (high - low)
        assert (lo, hi) == pytest.approx((max(0, low - more), min(1, high + more)))


@pytest.mark.parametrize(
    ("mode", "heavier_later"), [("independent", True), ("prepend", True), ("append", False)]
)
def test_heavy_noise_is_for_stacks_next_to_the_embedding(config, mode, heavier_later):
    starts = [stage.noise[0] for stage in stages(config(mode))]
    assert starts == sorted(starts, reverse=not heavier_later)


def test_a_point_mask_is_trained_on_and_scored_on_alike(config):
    listed = stages(config(training__progressive__time_step_mask_fractions=[0.1, 0.4, 0.8]))
    assert [stage.noise for stage in listed] == [(0.1, 0.1), (0.4, 0.4), (0.8, 0.8)]
    assert all(stage.scored_noise == stage.noise for stage in listed)


@pytest.mark.parametrize("choice", ["input", "none"])
def test_without_depth_stages_take_all_noise(config, choice):
    listed = stages(config("prepend", training__progressive__time_interpretation=choice))
    assert {stage.scored_noise for stage in listed} == {None}


def test_a_joint_phase_takes_all_noise(config):
    listed = stages(config(training__progressive__joint_tuning=True))
    assert [stage.noise is None for stage in listed] == [False, False, False, True]
    assert listed[-1].scored_noise is None


def test_stages_are_written_out_and_read_again(config):
    listed = stages(config())
    assert [Stage.from_dict(stage.to_dict()) for stage in listed] == listed
    by_hand = config(training__stages=[stage.to_record() for stage in listed])
    assert stages(by_hand) == listed


def test_a_run_draws_from_the_trained_range_and_is_scored_on_the_owned_one(config, monkeypatch):
    trained, scored = [], []
    original, evaluate = Masked.corrupt, loop.Engine._evaluate

    def corrupt(self, batch, noise=None, counts=None):
        (trained if scoring[0] is False else scored).append(noise)
        return original(self, batch, noise, counts)

    def evaluated(self, when):
        scoring[0] = True
        result = evaluate(self, when)
        scoring[0] = False
        return result

    scoring = [False]
    monkeypatch.setattr(Masked, "corrupt", corrupt)
    monkeypatch.setattr(loop.Engine, "_evaluate", evaluated)
    events: list[dict] = []

    class Kept:
        def emit(self, event):
            events.append(dict(event))

        def close(self):
            pass

    run = config(evaluation__passes=1)
    train(run, sinks=[Kept()])
    listed = stages(run)
    assert list(dict.fromkeys(trained)) == [stage.noise for stage in listed]
    assert list(dict.fromkeys(scored)) == [stage.eval_noise for stage in listed]
    assert {event["label"] for event in events if event["event"] == "eval"} == {"part of a bound"}


@pytest.mark.parametrize(("choice", "shown"), [("depth", 0), ("none", 2)])
def test_losses_around_a_growth_are_shown_only_where_the_noise_is_the_same(config, choice, shown):
    seen = []

    class Kept:
        def emit(self, event):
            seen.append(event.get("when"))

        def close(self):
            pass

    train(config("prepend", training__progressive__time_interpretation=choice), sinks=[Kept()])
    assert (seen.count("before_growth"), seen.count("after_growth")) == (shown, shown)
    assert seen.count("stage_end") + seen.count("final") == 3


def test_point_masks_are_scored_without_a_bound(config):
    points = config(training__progressive__time_step_mask_fractions="schedule")
    assert {label_of(points, stage.scored_noise) for stage in stages(points)} == {"pseudo"}
    assert label_of(points) == "pseudo"
    assert (label_of(config()), label_of(config(), (0.2, 0.4)), label_of(config(), (0.2, 0.2))) == (
        "bound",
        "part of a bound",
        "pseudo",
    )


def test_several_mistakes_of_time_are_told_at_once(config):
    with pytest.raises(ConfigError) as caught:
        config(
            training__progressive__num_time_steps=250,
            training__progressive__stack_time_mapping="custom",
            training__progressive__time_boundaries=[0.1, 0.5, 0.4, 1],
        )
    assert [problem.key.rpartition(".")[2] for problem in caught.value.problems] == [
        "num_time_steps",
        "time_boundaries",
        "time_boundaries",
    ]


def test_the_nearest_schedule_is_named(config):
    with pytest.raises(ConfigError, match="cosine") as caught:
        config(objective__noise_schedule="cosin", training__progressive__time_sampling="sampl")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_time_steps", 200), ("time_boundaries", [0, 0.3, 1]), ("target_stacks", 2)],
)
def test_a_builder_does_not_grow_past_the_noise_there_is(key, value):
    progressive = {"training_objective": "mlm", "building_mode": "prepend", "target_stacks": 2, key: value}
    if key == "time_boundaries":
        progressive["stack_time_mapping"] = "custom"
    if key != "target_stacks":
        progressive["target_stacks"] = 2
    model = {"attention_preset": "bert_style", "d_model": 16, "n_heads": 2, "vocab_size": 11}
    config = StackWiseConfig.from_dict({"model": model, "training": {"progressive": progressive}})
    if key != "target_stacks":
        config.training.progressive.target_stacks = None
    builder = ProgressiveRackBuilder(config)
    for _ in range(2):
        builder.prepend_stack()
    with pytest.raises(ValueError, match=rf"{key} has noise for 2: one more would lie past the horizon"):
        builder.prepend_stack()
    config.training.progressive.time_interpretation = "none"
    ProgressiveRackBuilder.prepend_stack(builder)


def test_growth_at_the_other_end_warns_where_depth_is_time():
    model = {"attention_preset": "bert_style", "d_model": 16, "n_heads": 2, "vocab_size": 11}
    progressive = {"training_objective": "mlm", "building_mode": "prepend"}
    config = StackWiseConfig.from_dict({"model": model, "training": {"progressive": progressive}})
    builder = ProgressiveRackBuilder(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        builder.append_stack()
        builder.prepend_stack()
    with pytest.warns(UserWarning, match="append_stack under building_mode prepend moves the older stacks"):
        builder.append_stack()


def test_the_trainer_tells_the_time_and_the_mask_share_of_each_stack(config):
    ids = torch.randint(0, 9, (6, 12))
    run = config("prepend", model__vocab_size=11, objective__mask_token_id=10)
    result = ProgressiveTrainer(run).train_progressively(
        ProgressiveRackBuilder(run), [{"input_ids": ids}], eval_dataloader=[{"input_ids": ids}]
    )
    rows = result["training_history"]
    assert [row["time_step"] for row in rows] == [0, 100, 200]
    assert [row["mask_ratio"] for row in rows] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
