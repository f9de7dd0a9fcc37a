"""The plan is what the run then does."""

from __future__ import annotations

import json
import os

import pytest

from stackwise import estimate_memory, plan, train
from stackwise.config.errors import ConfigError
from stackwise.planning.report import Plan
from stackwise.training.keeper import RunKeeper


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


ITEMS = ("parameters", "gradients", "moments", "activations", "buffers")
EXACT = ("parameters", "gradients", "moments", "buffers")
TWO = {"model__architecture__n_stacks": 2, "training__max_steps": 1}
APPEND = {**TWO, "training__progressive__joint_tuning": False}
CONFIGS = {
    "append with a joint phase": TWO,
    "tied, dropout, layernorm after": {
        **APPEND,
        "model__tie_embeddings": True,
        "model__dropout": 0.1,
        "model__norm": "layernorm",
        "model__norm_placement": "post",
        "model__ffn_type": "gelu",
    },
    "windows with sinks, four norms, capped scores": {
        **APPEND,
        "model__sliding_window": 5,
        "model__attention_sinks": 2,
        "model__norm_placement": "both",
        "model__attention_softcap": 4.0,
        "model__head_dim": 6,
        "model__rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "ALiBi in a window, parallel layers": {
        **APPEND,
        "model__pos_encoding": "alibi",
        "model__sliding_window": 5,
        "model__parallel_layers": True,
        "model__attention_bias": "qkv",
    },
    "bf16, bias, short convolutions, Muon": {
        **APPEND,
        "training__dtype": "bfloat16",
        "model__bias": True,
        "model__short_conv": 2,
        "model__qk_norm": True,
        "training__optimizer__optimizer_type": "Muon",
    },
    "blocks run again, two micro-batches": {
        **APPEND,
        "training__gradient_checkpointing": True,
        "training__gradient_accumulation_steps": 2,
    },
    "nf4 trunk": {**APPEND, "training__progressive__trunk_precision": "nf4"},
    "adapters on an fp8 trunk": {
        **APPEND,
        "training__progressive__trunk_precision": "fp8",
        "training__progressive__qlora_enabled": True,
        "training__progressive__trunk_strategy": "qlora",
    },
    "8-bit moments": {**APPEND, "model__d_model": 64, "training__optimizer__memory": "int8"},
    "no master weights": {**APPEND, "model__d_model": 64, "training__optimizer__memory": "int8_nomaster"},
    "update in the backward pass": {
        **APPEND,
        "model__d_model": 64,
        "training__optimizer__memory": "fused",
        "training__max_grad_norm": 0.0,
    },
    "moments on the host": {**APPEND, "training__optimizer__state_device": "host"},
    "streamed trunk": {**APPEND, "training__progressive__trunk_residency": "streamed"},
    "everything streamed": {
        **APPEND,
        "training__progressive__trunk_residency": "streamed",
        "training__residency": "streamed",
    },
    "prepend, SGD": {
        **APPEND,
        "training__progressive__building_mode": "prepend",
        "training__optimizer__optimizer_type": "SGD",
    },
    "prepended stacks held to what the older ones read": {
        **TWO,
        "model__architecture__n_stacks": 3,
        "model__architecture__blocks_per_stack": 2,
        "model__attention_preset": "bert_style",
        "training__progressive__building_mode": "prepend",
        "training__progressive__training_objective": "diffusion",
        "training__progressive__consistency_weight": 0.1,
        "training__progressive__joint_tuning": True,
    },
    "held to it, in bf16, block by block": {
        **TWO,
        "model__architecture__blocks_per_stack": 2,
        "training__unit": "block",
        "training__dtype": "bfloat16",
        "training__progressive__building_mode": "prepend",
        "training__progressive__consistency_weight": 0.1,
    },
    "spectral norm": {**APPEND, "model__spectral_norm": True},
    "time as scale and shift": {
        **APPEND,
        "model__attention_preset": "bert_style",
        "training__progressive__training_objective": "diffusion",
        "training__progressive__time_interpretation": "input",
        "training__progressive__time_encoding_type": "learned",
        "training__progressive__time_conditioning": "adaln",
    },
    "cyclic": {
        **TWO,
        "training__progressive__building_mode": "cyclic",
        "training__progressive__cycle_sweeps": 1,
    },
    "independent": {**TWO, "training__progressive__building_mode": "independent"},
    "independent with own embeddings after a shared start": {
        **TWO,
        "model__attention_preset": "bert_style",
        "model__tie_embeddings": False,
        "training__progressive__building_mode": "independent",
        "training__progressive__training_objective": "diffusion",
        "training__progressive__shared_start_fraction": 0.3,
        "training__optimizer__optimizer_type": "Muon",
    },
    "experts": {
        **TWO,
        "model__moe__n_experts": 4,
        "model__moe__d_ff": 24,
        "model__moe__n_shared": 1,
        "model__moe__z_weight": 0.1,
    },
    "experts computed again": {
        **TWO,
        "model__moe__n_experts": 3,
        "model__moe__balancing": "bias",
        "training__gradient_checkpointing": True,
    },
    "grow": {**TWO, "training__max_steps": 4, "training__progressive__building_mode": "grow"},
    "end to end, Adam": {
        **TWO,
        "training__progressive__enabled": False,
        "training__optimizer__optimizer_type": "Adam",
        "training__loss_chunk_tokens": 16,
    },
}


@pytest.fixture
def copied(monkeypatch):
    """Bytes that the last save of each stage copied."""
    original, seen = RunKeeper.save, {}

    def save(self, engine, pin, since):
        original(self, engine, pin, since)
        seen[engine.progress.stage] = sum(held.nbytes for held in self.saver._buffers.values())

    monkeypatch.setattr(RunKeeper, "save", save)
    return seen


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_planned_stages_equal_the_stages_of_the_run(tiny, changes, copied):
    config = tiny(**changes)
    planned = plan(config).stages
    history = train(config, sinks=[])["training_history"]
    for index, stage in enumerate(
        planned
    ):  # not planned: vectors of norms and routers that no gradient moves
        assert stage.copied_bytes <= copied[index] <= 1.07 * stage.copied_bytes
    assert [s.name for s in planned] == [h["name"] for h in history]
    for stage, entry in zip(planned, history, strict=True):
        assert stage.steps == entry["steps"]
        assert stage.tokens == entry["tokens"]
        assert stage.flops == pytest.approx(entry["flops"], rel=1e-9)
        assert stage.trainable_parameters == entry["trainable_params"]
        for item in EXACT:
            assert stage.bytes[item] == entry["bytes"][item], (stage.name, item)
        assert stage.bytes["activations"] == pytest.approx(entry["bytes"]["activations"], rel=0.02)
        assert stage.memory.host_total == entry["bytes"]["host"], stage.name


def test_a_budget_in_epochs_is_read_off_the_data(tiny):
    config = tiny(training__max_steps=None, training__epochs_per_stack=2)
    tokens = plan(config).stages[0].tokens
    text = 85 * 40 * 9 // 10  # characters of the training split, about
    assert tokens == pytest.approx(2 * text, rel=0.1)


def test_growth_and_freezing_are_told(tiny):
    laid_out = plan(tiny())
    stages = laid_out.stages
    assert stages[0].grows == ""
    assert stages[1].grows == "append 1 (copy)"
    assert [s.prefix_blocks for s in stages] == [0, 1, 2, 0]
    assert [s.n_stacks for s in stages] == [1, 2, 3, 3]
    assert [s.units for s in stages] == [6, 7, 8, 12]
    assert [s.trunk for s in stages] == ["none", "recomputed", "recomputed", "none"]
    assert laid_out.peak_bytes == max(s.peak_bytes for s in stages) == laid_out.largest.peak_bytes


def test_a_plan_is_json_and_complete(tiny):
    config = tiny(**APPEND, training__gradient_checkpointing=True)
    told = json.loads(json.dumps(plan(config, "h200").to_dict()))
    stage = told["stages"][1]
    assert stage["memory"]["items"] == stage["bytes"]
    assert stage["memory"]["total"] == sum(stage["bytes"].values())
    assert stage["memory"]["boundaries"] > 0
    assert told["device"]["name"] == "h200"
    assert told["hours"] == pytest.approx(told["total_flops"] / told["rate"] / 3600)


def test_the_memory_of_a_run_is_that_of_its_largest_stage(tiny):
    laid_out, memory = plan(tiny(**ONE)), estimate_memory(tiny(**ONE))
    assert {item: memory[item] for item in ITEMS} == laid_out.largest.bytes
    assert memory["peak"] == laid_out.peak_bytes
    assert memory["disk"] == laid_out.disk_bytes > memory["parameters"]


ONE = {"model__architecture__n_stacks": 1, "training__progressive__enabled": False}


def test_hours_follow_the_rate_and_the_device(tiny):
    config = tiny(**ONE)
    slow, fast = plan(config, "t4"), plan(config, "h200")
    assert slow.dtype == fast.dtype == "float32"
    assert slow.hours > fast.hours
    assert plan(config, "t4", rate=2 * slow.rate).hours == pytest.approx(slow.hours / 2)
    config.training.dtype = "auto"
    assert plan(config, "t4").dtype == "float32"
    assert plan(config, "h200").dtype == "bfloat16"


def test_a_budget_decides_what_fits(tiny):
    config = tiny(**ONE)
    whole = plan(config).peak_bytes / 2**30
    assert plan(config, budget_gib=whole * 1.3).fits == "yes"
    assert plan(config, budget_gib=whole * 1.1).fits == "tight"
    assert plan(config, budget_gib=whole * 0.9).fits == "no"
    with pytest.raises(ConfigError, match="above 0"):
        plan(config, budget_gib=0)
    with pytest.raises(ConfigError, match="rtx4090"):
        plan(config, "rtx409")


def test_a_masked_row_takes_more_than_one_without_edges(tiny, tmp_path):
    """Rows of several documents need a mask, which attention keeps."""
    other = tmp_path / "more.txt"
    other.write_text("All work and no play makes Jack a dull boy.\n" * 50)
    one, two = tiny(**ONE), tiny(**ONE, data__path=[str(tmp_path / "text.txt"), str(other)])
    plans: list[Plan] = [plan(one), plan(two)]
    assert [p.edges for p in plans] == [False, True]
    assert plans[0].stages[0].bytes["activations"] < plans[1].stages[0].bytes["activations"]


def test_a_joint_phase_of_few_steps_is_in_the_plan_and_in_the_run(tiny):
    config = tiny(training__max_steps=500, training__progressive__joint_tuning_fraction=0.01)
    (note,) = plan(config).notes
    assert "leaves 9 of the run's 1,509 steps for the joint phase" in note

    class Enough(Exception):
        """Nothing needs to be trained to see the notes."""

    told = []

    class Notes:
        def emit(self, event):
            if event["event"] == "note":
                told.append(event["message"])
            if event["event"] == "stage_start":
                raise Enough

        def close(self):
            pass

    with pytest.raises(Enough):
        train(config, sinks=[Notes()])
    assert note in told
