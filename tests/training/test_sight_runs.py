"""Whole runs with windows, ALiBi, scaled positions and other layouts of a block: they train, resume, plan and generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stackwise.model.describe import rack_spec
from stackwise.model.rope_scaling import RopeScaling
from stackwise.training.run import train
from stackwise.training.stored import open_run

RUNS = {
    "window": {
        "model__sliding_window": 4,
        "model__attention_sinks": 1,
        "model__norm_placement": "both",
        "model__head_dim": 6,
        "model__local_rope_theta": 100.0,
    },
    "alibi": {"model__pos_encoding": "alibi", "model__parallel_layers": True, "training__dtype": "bfloat16"},
    "scaled": {
        "model__rope_scaling": {"type": "dynamic", "original_max_seq_len": 8},
        "model__attention_softcap": 5.0,
        "model__attention_bias": "qkv",
    },
    "as ModernBERT": {
        "training__progressive__enabled": False,
        "model__attention_preset": "bert_style",
        "training__progressive__training_objective": "mlm",
        "model__sliding_window": 3,
        "model__window_every": 3,
        "model__full_block": 0,
        "model__first_norm": False,
    },
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_learns_and_the_rack_that_it_leaves_is_as_described(tiny, kind):
    config = tiny(**RUNS[kind], training__optimizer__lr=1e-2)
    result = train(config, sinks=[])
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    losses = [event["loss"] for event in map(json.loads, lines) if event["event"] == "step"]
    assert losses[-1] < losses[0] - 0.1
    rack = open_run(result["run_dir"]).rack
    config.model.vocab_size = rack.spec.vocab_size
    assert rack.spec.blocks == rack_spec(config).blocks
    ids = torch.randint(0, rack.spec.vocab_size, (2, 6))
    if rack.is_causal:
        assert rack.generate(ids, max_new_tokens=20, temperature=0.0).shape == (2, 26)
    assert rack(ids).isfinite().all()


def test_another_run_goes_on_at_a_longer_context_from_the_weights_of_a_shorter(tiny):
    short = train(tiny(model__max_seq_len=16, training__run_id="short"), sinks=[])
    longer = {
        "model__max_seq_len": 48,
        "model__rope_scaling": {"type": "yarn", "original_max_seq_len": 16},
        "training__seq_len": 48,
        "checkpoint__init_from": short["run_dir"],
    }
    long = train(tiny(**longer, training__run_id="long"), sinks=[])
    assert open_run(long["run_dir"]).rack.spec.blocks[0].rope_scaling == RopeScaling("yarn", 3.0, 16)
