"""Mixtures of experts in whole runs: the load is balanced, and everything that holds of a run holds of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.training.errors import Interrupted
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.training.stored import open_run

AUX = {
    "model__moe__n_experts": 3,
    "model__moe__d_ff": 16,
    "model__moe__aux_weight": 1.0,
    "model__moe__z_weight": 0.1,
}
BIAS = {**AUX, "model__moe__balancing": "bias", "model__moe__router": "sigmoid", "model__moe__n_shared": 1}
ONE = {"model__architecture__n_stacks": 1, "training__progressive__enabled": False}


def run(tiny, name, **keys):
    return Path(train(tiny(training__run_id=name, **keys), sinks=[])["run_dir"])


def hashes(run_dir):
    commit = Store(run_dir / "store").latest()
    return {name: part.sha256 for name, part in commit.parts.items()}


def weights(run_dir):
    return open_run(run_dir).rack.state_dict()


def events(run_dir, kind):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


@pytest.mark.parametrize("keys", [AUX, BIAS], ids=["aux", "bias"])
def test_accumulation_changes_nothing_but_rounding(tiny, keys):
    whole = run(tiny, "whole", training__batch_size=4, **keys, **ONE)
    parts = run(tiny, "parts", training__batch_size=1, training__gradient_accumulation_steps=4, **keys, **ONE)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-3, atol=2e-5)
    losses = [[e["loss"] for e in events(folder, "experts")] for folder in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("keys", [AUX, BIAS], ids=["aux", "bias"])
def test_recomputed_and_streamed_runs_are_the_same_to_the_last_bit(tiny, keys):
    again = run(tiny, "again", training__gradient_checkpointing=True, **keys)
    streamed = {"training__residency": "streamed", "training__progressive__trunk_residency": "streamed"}
    assert hashes(run(tiny, "streamed", **streamed, **keys)) == hashes(again)
    plain = weights(run(tiny, "plain", **keys))
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)


def test_a_stopped_run_is_resumed_exactly_offsets_included(tiny, monkeypatch):
    whole = run(tiny, "whole", **BIAS)
    original = Engine._after_step

    def after(self, stage):
        original(self, stage)
        if self.progress.step == 7:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Engine, "_after_step", after)
    with pytest.raises(Interrupted):
        run(tiny, "stopped", **BIAS)
    monkeypatch.setattr(Engine, "_after_step", original)
    resumed = run(tiny, "stopped", checkpoint__resume="auto", **BIAS)
    assert hashes(resumed) == hashes(whole)
    assert any(tensor.any() for name, tensor in weights(whole).items() if "selection_bias" in name)


def test_offsets_move_once_per_step_and_rest_in_frozen_stacks(tiny):
    keys = {**BIAS, "training__progressive__joint_tuning": False, "training__gradient_accumulation_steps": 2}
    keys["training__progressive__new_stack_init"] = "random"  # a copy takes the offsets over
    held = weights(run(tiny, "bias", **keys))
    for name, tensor in held.items():
        if "selection_bias" in name:
            moves = tensor / 0.001
            torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-3)
            steps = (
                15 if name.startswith("tail") else 5
            )  # the tail trains in all three stages, a stack in one
            assert 0 < moves.abs().max() <= steps + 1e-3


def test_a_strong_loss_evens_the_load(tiny):
    keys = {**ONE, "training__max_steps": 60, "training__optimizer__lr": 0.02, "tracking__log_interval": 60}
    keys |= {"model__moe__n_experts": 6, "model__moe__top_k": 1, "model__moe__d_ff": 16}
    free = events(run(tiny, "free", **keys, model__moe__aux_weight=0.0), "experts")[-1]
    even = events(run(tiny, "even", **keys, model__moe__aux_weight=3.0), "experts")[-1]
    assert even["max_load"] < free["max_load"]
    assert 1 <= even["max_load"] < 1.6
    assert free["loss"] == 0 < even["loss"]


def test_dense_runs_tell_nothing_of_experts(tiny):
    assert events(run(tiny, "dense"), "experts") == []


@pytest.mark.parametrize(
    "keys",
    [
        {"training__optimizer__optimizer_type": "Muon"},
        {"model__spectral_norm": True},
        {"training__progressive__building_mode": "grow", "model__architecture__n_stacks": 2},
        {"training__progressive__building_mode": "cyclic"},
        {"training__progressive__building_mode": "prepend", "training__progressive__trunk_precision": "nf4"},
        {"training__progressive__trunk_precision": "fp8", "training__progressive__qlora_enabled": True},
        {"training__optimizer__memory": "int8_nomaster"},
        {"training__dtype": "bfloat16"},
        {"model__moe__every": 2, "model__architecture__blocks_per_stack": 2, "model__freeze_up_proj": True},
        {"model__moe__first_dense": 1, "training__progressive__new_stack_init": "random"},
    ],
    ids=lambda keys: "+".join(f"{key.rpartition('__')[2]}={value}" for key, value in keys.items()),
)
def test_runs_of_all_kinds_go_through_and_open_again(tiny, keys):
    folder = run(tiny, "kind", **{**BIAS, **keys}, training__max_steps=3)
    rack = open_run(folder).rack.eval()
    with torch.no_grad():
        logits = rack(torch.arange(8)[None])
    assert torch.isfinite(logits).all()
    assert any("ffn.experts.2.down" in name for name, _ in rack.named_modules())


@pytest.mark.parametrize(
    ("keys", "room"), [(AUX, 10**9), (BIAS, 100_000)], ids=["aux, everything", "bias, a part"]
)
def test_stored_outputs_of_a_trunk_with_experts_change_nothing_but_rounding(tiny, tmp_path, keys, room):
    trunk = "training__progressive__"
    stored = {
        f"{trunk}cache_activations": True,
        f"{trunk}cache_dtype": "float32",
        f"{trunk}cache_dir": str(tmp_path / "cache"),
        f"{trunk}cache_ram_bytes": room,
        f"{trunk}cache_max_bytes": room,
    }
    twice = {"training__seq_len": 48, "training__max_steps": 24, **keys}  # more rows than the text has
    plain = run(tiny, "plain", **twice, **{f"{trunk}cache_activations": False})
    read = run(tiny, "stored", **twice, **stored)
    assert sum(e["stored"]["hits"] for e in events(read, "stage_end") if e["stored"]) > 0
    losses = [[e["loss"] for e in events(folder, "step")] for folder in (plain, read)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in weights(read).items():
        torch.testing.assert_close(tensor, weights(plain)[name], rtol=1e-3, atol=2e-5)
