"""A resumed run and settings that have changed since: refused, allowed, or free."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stackwise import ConfigError, StackWiseConfig
from stackwise.checkpoint.store import Store
from stackwise.config.resume_classes import CLASSES, SECTIONS, class_of
from stackwise.config.schema import schema_rows
from stackwise.curriculum.stage import Stage
from stackwise.training import run
from stackwise.training.changes import (
    changes_between,
    check_allowed,
    continued_stages,
    course_of,
)
from stackwise.training.errors import IncompatibleResumeError, Interrupted
from stackwise.training.loop import Engine
from stackwise.training.progress import Progress
from stackwise.training.run import train
from stackwise.training.surroundings import differences, surroundings

KEYS = [row.key for row in schema_rows()]


def quiet(config, **options):
    return train(config, sinks=[], **options)


def meta_of(run_dir) -> dict:
    store = Store(Path(run_dir) / "store")
    return store.meta(store.latest())


def hashes(run_dir) -> dict[str, str]:
    commit = Store(Path(run_dir) / "store").latest()
    return {name: part.sha256 for name, part in commit.parts.items()}


def notes(run_dir) -> list[str]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [e["message"] for e in map(json.loads, lines) if e["event"] == "note"]


@pytest.fixture
def stopped(tiny, monkeypatch):
    """A run stopped by a signal after so many steps."""
    original = Engine._after_step

    def make(steps: int, **settings) -> None:
        def after(self, stage):
            original(self, stage)
            if self.progress.step == steps:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Engine, "_after_step", after)
        with pytest.raises(Interrupted):
            quiet(tiny(**settings))
        monkeypatch.setattr(Engine, "_after_step", original)

    return make


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_class(key):
    assert class_of(key) in ("identity", "schedule", "free")


def test_a_new_key_has_none_until_it_is_given_one():
    for key in ("training.brand_new", "training.optimizer.brand_new", "training.progressive.brand_new"):
        with pytest.raises(KeyError, match="has no class"):
            class_of(key)
    assert [key for key in CLASSES if key not in KEYS] == []
    sections = {key.rpartition(".")[0] for key in KEYS} | set(KEYS)
    assert [s for s in SECTIONS if not any(k == s or k.startswith(f"{s}.") for k in sections)] == []


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.d_model", "identity"),
        ("model.stacks.3.n_heads", "identity"),
        ("data.path", "identity"),
        ("data.num_workers", "free"),
        ("training.seed", "identity"),
        ("training.optimizer.optimizer_type", "identity"),
        ("training.optimizer.lr", "schedule"),
        ("training.optimizer.groups.0.match", "schedule"),
        ("training.optimizer.custom_params.nesterov", "identity"),
        ("training.stages.2.grow.op", "identity"),
        ("training.stages.2.lr", "schedule"),
        ("training.progressive.qlora_configs.1.rank", "identity"),
        ("training.max_steps", "schedule"),
        ("checkpoint.init_from", "identity"),
        ("checkpoint.save_interval", "free"),
        ("tracking.log_interval", "free"),
        ("generation.seed", "free"),
    ],
)
def test_classes(key, kind):
    assert class_of(key) == kind


def test_the_course_is_what_is_not_free_list_items_apart(tiny):
    old = tiny(training__stages=[{"train": ["all"], "max_steps": 2}, {"train": ["norm"], "max_steps": 3}])
    new = old.model_copy(deep=True)
    new.training.stages[1].lr = 0.5
    new.tracking.log_interval = 77
    (change,) = changes_between(course_of(old), course_of(new))
    assert (change.key, change.kind, change.old, change.new) == (
        "training.stages.1.lr",
        "schedule",
        None,
        0.5,
    )
    assert json.loads(json.dumps(course_of(new))) == course_of(new)


def test_a_key_that_came_later_had_its_default(tiny):
    old = course_of(tiny())
    old = {key: value for key, value in old.items() if not key.startswith("training.spike")}
    assert changes_between(old, course_of(tiny())) == []
    (change,) = changes_between(old, course_of(tiny(training__spike_sigma=3.0)))
    assert change.key == "training.spike_sigma"
    (gone,) = changes_between({**old, "training.long_gone": 3}, course_of(tiny()))
    assert gone.kind == "identity"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("training.optimizer.lrr", "did you mean 'training.optimizer.lr'"),
        ("model.d_model", "cannot change within a run"),
        ("training.seed", r"checkpoint\.init_from"),
    ],
)
def test_what_cannot_be_allowed_is_named(tiny, given, message):
    with pytest.raises(ConfigError, match=message):
        quiet(tiny(), allow_change=["training.max_steps", given])


def test_keys_and_sections_may_be_allowed():
    given = [
        "training.optimizer.lr",
        " training.optimizer ",
        "",
        "training.stages.0.lr",
        "training.optimizer.groups",
    ]
    assert check_allowed(given) == [key.strip() for key in given if key]


# --- stages ---------------------------------------------------------------------------------------------------------


def program(*steps: int, **fields) -> list[Stage]:
    return [Stage(f"s{i}", i + 1, ("all",), n, **fields) for i, n in enumerate(steps)]


def test_what_is_over_stays_and_what_is_left_is_new():
    stored, fresh = program(5, 5, 5), program(9, 9, 9)
    inside = Progress(stage=1, stage_step=3, begun=True)
    assert [s.steps for s in continued_stages(stored, fresh, inside)] == [5, 9, 9]
    at_end = Progress(stage=1, stage_step=5, begun=True)
    assert [s.steps for s in continued_stages(stored, fresh, at_end)] == [5, 5, 9]
    assert [s.steps for s in continued_stages(stored, program(1, 1, 1), at_end)] == [5, 5, 1]
    finished = Progress(stage=2, stage_step=5, begun=True)
    assert [s.steps for s in continued_stages(stored, fresh, finished)] == [5, 5, 9]
    assert [s.steps for s in continued_stages(stored, program(3, 3, 3), inside)] == [5, 3, 3]


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (program(9, 9), "3 stages, and with the new settings 2"),
        (program(9, 2, 9), r"stage 2 \(s1\) has taken 3 steps already, more than the new 2"),
        (
            [*program(9, 9), replace(program(9)[0], trains=("norm",), n_stacks=3)],
            r"stage 3 \(s2\) would have another trains",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused_with_the_reason(fresh, message):
    with pytest.raises(IncompatibleResumeError, match=message):
        continued_stages(program(5, 5, 5), fresh, Progress(stage=1, stage_step=3, begun=True))


def test_a_schedule_shared_with_a_stage_that_is_over_cannot_change_its_length():
    stored = [replace(s, schedule=(5 * i, 15)) for i, s in enumerate(program(5, 5, 5))]
    fresh = [replace(s, schedule=(9 * i, 27)) for i, s in enumerate(program(9, 9, 9))]
    with pytest.raises(
        IncompatibleResumeError, match="share one schedule, and the first of them, which is over, took 5"
    ):
        continued_stages(stored, fresh, Progress(stage=1, stage_step=3, begun=True))
    first = Progress(stage=0, stage_step=3, begun=True)
    assert continued_stages(stored, fresh, first) == fresh


# --- runs -----------------------------------------------------------------------------------------------------------


def test_an_identity_key_is_refused_with_the_difference_and_the_way_out(tiny, stopped):
    stopped(4)
    with pytest.raises(
        IncompatibleResumeError, match=r"training\.seed: 42 there, 7 here  \(identity\)"
    ) as error:
        quiet(tiny(training__seed=7, training__optimizer__lr=0.5), allow_change=["training.optimizer.lr"])
    assert error.value.exit_code == 7
    assert "checkpoint.init_from=" in str(error.value)
    assert "training.optimizer.lr:" not in str(error.value)  # allowed


def test_a_schedule_key_needs_to_be_allowed_and_is_recorded(tiny, stopped):
    stopped(7)
    faster = tiny(training__optimizer__lr=0.01)
    with pytest.raises(IncompatibleResumeError, match=r"--allow-change training\.optimizer\.lr\n") as error:
        quiet(faster)
    assert "stackwise ckpt fork" in str(error.value)
    result = quiet(faster, allow_change=["training.optimizer.lr"])
    assert meta_of(result["run_dir"])["progress"]["changes"] == [
        {"step": 7, "key": key, "kind": "schedule", "old": 0.003, "new": 0.01}
        for key in ("training.new_stack_lr", "training.optimizer.lr", "training.trunk_lr")
    ]
    assert meta_of(result["run_dir"])["config"]["training.optimizer.lr"] == 0.01
    assert any(
        "not bit-exact: " in note and "training.optimizer.lr 0.003 -> 0.01" in note
        for note in notes(result["run_dir"])
    )
    rates = [
        e["lr"]
        for e in map(json.loads, (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines())
        if e["event"] == "step"
    ]
    assert max(rates[:7]) <= 0.003 < 0.009 < max(rates[7:])
    assert quiet(faster)["resumed_from"]  # they are its own settings now


def test_a_derived_value_that_does_not_follow_from_what_is_allowed_is_refused(tiny, stopped):
    stopped(7, training__trunk_lr=0.5)
    with pytest.raises(IncompatibleResumeError, match=r"training\.trunk_lr: 0\.5 there, 0\.01 here"):
        quiet(tiny(training__optimizer__lr=0.01), allow_change=["training.optimizer.lr"])


def test_a_changed_run_that_is_stopped_goes_on_as_an_uninterrupted_one(tiny, stopped, monkeypatch):
    found = []
    for name, again in (("whole", None), ("parts", 9)):
        stopped(7, training__run_id=name)
        longer = {"training__run_id": name, "training__max_steps": 8, "training__batch_size": 2}
        allow = ["training.max_steps", "training.batch_size"]
        if again is not None:
            original = Engine._after_step

            def after(self, stage, original=original, again=again):
                original(self, stage)
                if self.progress.step == again:
                    signal.raise_signal(signal.SIGTERM)

            with monkeypatch.context() as patch:
                patch.setattr(Engine, "_after_step", after)
                with pytest.raises(Interrupted):
                    quiet(tiny(**longer), allow_change=allow)
            allow = []
        result = quiet(tiny(**longer), allow_change=allow)
        assert [entry["steps"] for entry in result["training_history"]][:3] == [5, 8, 8]
        found.append(hashes(result["run_dir"]))
    assert found[0] == found[1]


def test_a_finished_run_can_be_made_longer(tiny):
    one = {"training__progressive__enabled": False}
    quiet(tiny(**one))
    result = quiet(tiny(**one, training__max_steps=9), allow_change=["training.max_steps"])
    assert result["steps"] == 9
    assert meta_of(result["run_dir"])["progress"]["stage_step"] == 9


def test_a_hand_written_stage_to_come_may_change(tiny, stopped):
    stages = [{"train": ["all"], "max_steps": 3}, {"train": ["all"], "max_steps": 3}]
    stopped(2, training__stages=stages)
    stages[1]["max_steps"], stages[1]["lr"] = 6, 0.02
    result = quiet(
        tiny(training__stages=stages), allow_change=["training.stages.1.max_steps", "training.stages.1.lr"]
    )
    assert [entry["steps"] for entry in result["training_history"]] == [3, 6]
    stages[1]["train"] = ["norm"]
    with pytest.raises(IncompatibleResumeError, match=r"training\.stages\.1\.train"):
        quiet(tiny(training__stages=stages), allow_change=["training.stages"])


def test_free_keys_are_applied(tiny, stopped):
    stopped(4)
    result = quiet(
        tiny(
            tracking__log_interval=1000,
            checkpoint__save_interval=2,
            training__gradient_checkpointing=True,
            training__progressive__cache_ram_bytes=0,
        )
    )
    quiet(tiny(training__run_id="whole"))
    assert hashes(result["run_dir"]) == hashes(Path(result["run_dir"]).parent / "whole")
    assert not [note for note in notes(result["run_dir"]) if "bit-exact" in note]
    assert StackWiseConfig.from_yaml(Path(result["run_dir"]) / "config.yaml").tracking.log_interval == 1000


def test_another_text_under_the_same_name_is_refused(tiny, stopped, text_file):
    stopped(4)
    text_file.write_text(text_file.read_text().replace("mind", "dnim"))
    with pytest.raises(IncompatibleResumeError, match="the corpus is another one"):
        quiet(tiny())


# --- environment ----------------------------------------------------------------------------------------------------


def test_surroundings_follow_what_they_name():
    here = surroundings(torch.device("cpu"), torch.float32)
    assert here["torch"] == torch.__version__
    assert json.loads(json.dumps(here)) == here
    assert differences(here, here) == []
    assert differences(here, surroundings(torch.device("cpu"), torch.bfloat16)) == [
        "dtype float32 -> bfloat16"
    ]
    torch.set_float32_matmul_precision("medium")
    try:
        assert differences(here, surroundings(torch.device("cpu"), torch.float32)) == [
            "float32_matmul highest -> medium"
        ]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", [*surroundings(torch.device("cpu"), torch.float32)])
def test_another_environment_is_noted_or_refused(tiny, stopped, monkeypatch, name):
    stopped(4)
    monkeypatch.setattr(run, "surroundings", lambda *of: {**surroundings(*of), name: "another"})
    with pytest.raises(
        IncompatibleResumeError, match=f"not bit-exact: {name} .* -> another.*--require-exact"
    ):
        quiet(tiny(), require_exact=True)
    if name == "torch":
        result = quiet(tiny())
        assert [
            note
            for note in notes(result["run_dir"])
            if f"not bit-exact: torch {torch.__version__} -> another" in note
        ]


def test_require_exact_lets_an_exact_resume_pass_and_no_changed_settings(tiny, stopped):
    stopped(4)
    with pytest.raises(IncompatibleResumeError, match=r"not bit-exact: training\.max_grad_norm"):
        quiet(tiny(training__max_grad_norm=0.5), allow_change=["training"], require_exact=True)
    assert quiet(tiny(), require_exact=True)["resumed_from"]


@pytest.mark.parametrize(
    ("settings", "shows"),
    [
        ({"training__dtype": "bfloat16"}, "bfloat16 products"),
        ({"training__dtype": "float32"}, None),
        ({"training__progressive__new_stack_precision": "bfloat16"}, "bfloat16 products"),
        ({"model__moe__n_experts": 2}, "with experts"),
        ({"training__dtype": "bfloat16", "training__progressive__cache_activations": False}, None),
    ],
    ids=str,
)
def test_outputs_stored_under_narrow_products_make_a_resume_inexact(tiny, stopped, settings, shows):
    settings = {"training__progressive__cache_activations": True, **settings}
    stopped(12, **settings)
    if shows is None:
        assert quiet(tiny(**settings), require_exact=True)["resumed_from"]
        return
    with pytest.raises(IncompatibleResumeError, match=rf"not bit-exact: stored outputs .*{shows}"):
        quiet(tiny(**settings), require_exact=True)
    result = quiet(tiny(**settings))
    assert [note for note in notes(result["run_dir"]) if "stored outputs of the trunk" in note]
