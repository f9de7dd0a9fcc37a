"""recipes/llama-70b-h200.yaml: fits on paper, steps without storage, and trains when it is made narrow."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from stackwise import StackWiseConfig, stages, train
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import trained_units
from stackwise.planning.devices import device_named
from stackwise.planning.plan import plan_on
from stackwise.planning.situation import Situation
from stackwise.planning.trace import LIVE, full_trace

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/llama-70b-h200.yaml"
NARROW = (
    "model.vocab_size=null",
    "model.d_model=64",
    "model.d_ff=192",
    "model.n_heads=8",
    "model.n_kv_heads=2",
    "model.max_seq_len=32",
    "model.architecture.n_stacks=3",
    "model.architecture.blocks_per_stack=1",
    "training.device=cpu",
    "training.dtype=float32",
    "training.batch_size=2",
    "training.seq_len=32",
    "training.max_steps=2",
    "training.warmup_steps=1",
    "data.source=text",
    "data.tokenizer=byte",
    "evaluation.batches=1",
    "generation.max_new_tokens=1",
    "tracking.report=false",
)


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_70b_stage", ROOT / "benchmarks/gpu_70b_stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_the_shape_and_fits_the_gpu():
    config = StackWiseConfig.from_yaml(RECIPE)
    h200 = device_named("h200")
    (last,) = plan_on(config, h200, only="stack 20").stages
    assert last.fits == "yes"
    assert (last.total_blocks, last.prefix_blocks) == (80, 76)
    assert 68.9e9 < last.parameters < 69.3e9
    assert last.memory.weights["nf4"] == pytest.approx(76 * 855.6e6 * 4.127 / 8, rel=1e-3)
    (joint,) = plan_on(config, h200, only="joint").stages
    assert joint.fits == "yes"
    assert joint.memory.boundaries == 80 * 4 * 16_384 * 8192, "an fp32 stream between 80 blocks"


def test_its_first_stage_steps_without_storage():
    config = StackWiseConfig.from_yaml(RECIPE)
    listed = stages(config)
    spec = stage_specs(config, listed, first_spec(config, listed), "bf16")[0]
    training = config.training
    step = Situation(
        spec,
        frozenset(trained_units(spec, listed[0])),
        training.batch_size,
        training.seq_len,
        kind="cuda",
        dtype="bfloat16",
        recompute=True,
    )
    trace = full_trace(step)
    parameters = 4 * 855.7e6 + 2 * 32_000 * 8192
    assert trace.most["gradients"] == pytest.approx(4 * parameters, rel=0.01)
    assert trace.most[LIVE] < 40e9


def test_a_narrow_copy_trains(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    config = StackWiseConfig.from_yaml(
        RECIPE, [*NARROW, f"data.path={text_file}", f"checkpoint.dir={tmp_path}"]
    )
    history = train(config, sinks=[])["training_history"]
    assert [entry["name"] for entry in history] == ["stack 1", "stack 2", "stack 3", "joint"]
    assert all(entry["loss_last"] < 6 for entry in history)
    sizes = [entry["bytes"]["parameters"] for entry in history]
    assert sizes[2] - sizes[1] < (sizes[1] - sizes[0]) * 1.1, "stacks that froze are stored in NF4"


def test_the_program_for_the_gpu_runs_narrow_on_the_cpu(benchmark):
    found = benchmark.measure(2, tiny=True)
    assert found["ratio"] == pytest.approx(1.0, abs=0.05)
    assert (found["blocks"], found["frozen_blocks"], found["steps"]) == (10, 8, 2)
    assert found["planned_weights"]["nf4"] > 0
    assert found["planned_items"] == {item: found["counted"][item] for item in found["planned_items"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_the_gpu_the_program_says_so(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_70b_stage.py"])
    assert benchmark.main() == 69
    assert "needs a GPU with 141 GB" in capsys.readouterr().err
