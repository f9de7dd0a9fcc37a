"""Whole runs with streamed stacks end with the same bytes as resident ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stackwise.checkpoint.store import Store
from stackwise.curriculum.growth import grow
from stackwise.curriculum.stage import Growth
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.trunk.residency import reside


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def hashes(result):
    commit = Store(Path(result["run_dir"]) / "store").latest()
    return {name: part.sha256 for name, part in commit.parts.items()}


def losses(result):
    return [
        (stage["loss_first"], stage["loss_last"], stage["eval_loss"]) for stage in result["training_history"]
    ]


RUNS = {
    "append": {"training__progressive__cache_activations": False},
    "prepend": {"training__progressive__building_mode": "prepend"},
    "grow": {"training__progressive__building_mode": "grow", "model__architecture__n_stacks": 4},
    "cyclic": {"training__progressive__building_mode": "cyclic", "training__progressive__cycle_sweeps": 2},
    "end to end": {"training__progressive__enabled": False},
    "adapters": {
        "model__dropout": 0.0,
        "training__progressive__trunk_strategy": "qlora",
        "training__progressive__qlora_enabled": True,
        "training__progressive__progressive_qlora": True,
        "training__progressive__qlora_dropout": 0.1,
        "training__progressive__trunk_precision": "nf4",
    },
}


STREAMED = {"training__residency": "streamed", "training__progressive__trunk_residency": "streamed"}


@pytest.mark.parametrize("run", RUNS)
def test_residency_changes_where_bytes_are_and_no_number(tiny, run):
    if run == "adapters":
        pytest.importorskip("peft")
    options = {"training__max_steps": 3, "model__dropout": 0.1, **RUNS[run]}
    options |= {"training__gradient_accumulation_steps": 2, "training__max_grad_norm": 0.1}
    resident = train(tiny(training__run_id="resident", **options), sinks=[])
    streamed = train(tiny(training__run_id="streamed", **options, **STREAMED), sinks=[])
    assert hashes(streamed) == hashes(resident)
    assert losses(streamed) == losses(resident)
    for a, b in zip(resident["training_history"], streamed["training_history"], strict=True):
        assert b["bytes"]["peak"] < a["bytes"]["peak"]
        assert b["bytes"]["host"] > 0


def test_each_of_the_two_keys_streams_its_own_blocks(tiny, monkeypatch):
    def parked(name, **options):
        seen = {}
        original = Engine._train_step

        def step(self, stage):
            original(self, stage)
            named = {f"{s.uid}.{i}": block for s in self.rack.stacks for i, block in enumerate(s.blocks)}
            named |= {f"tail.{i}": block for i, block in enumerate(self.rack.tail)}
            seen[stage.name] = {n for n, block in named.items() if block.parked is not None}

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_train_step", step)
            train(tiny(training__run_id=name, training__max_steps=1, **options), sinks=[])
        return seen

    everything = {"s0.0", "s1.0", "s2.0", "tail.0"}
    trained = parked("trained", training__residency="streamed")
    assert trained == {
        "stack 1": {"s0.0", "tail.0"},
        "stack 2": {"s1.0", "tail.0"},
        "stack 3": {"s2.0", "tail.0"},
        "joint": everything,
    }
    frozen = parked("frozen", training__progressive__trunk_residency="streamed")
    assert frozen == {"stack 1": set(), "stack 2": {"s0.0"}, "stack 3": {"s0.0", "s1.0"}, "joint": set()}


def test_mapped_stacks_leave_nothing_and_change_nothing(tiny, tmp_path):
    options = {"training__max_steps": 2, "training__progressive__cache_activations": False}
    folder = tmp_path / "cache"
    options["training__progressive__cache_dir"] = str(folder)
    resident = train(tiny(training__run_id="resident", **options), sinks=[])
    assert not folder.exists()
    options["training__progressive__trunk_residency"] = "mapped"
    mapped = train(tiny(training__run_id="mapped", **options), sinks=[])
    assert hashes(mapped) == hashes(resident)
    assert {file.name for file in folder.rglob("*.safetensors")} == {"s0.0.safetensors", "s1.0.safetensors"}


def test_a_streamed_rack_is_never_on_the_device_as_a_whole(tiny, monkeypatch):
    moved = []
    original = Rack.to
    monkeypatch.setattr(Rack, "to", lambda self, *given: (moved.append(given), original(self, *given))[1])
    options = {"training__max_steps": 1, "training__progressive__enabled": False}
    train(tiny(training__run_id="resident", **options), sinks=[])
    assert len(moved) == 1
    train(tiny(training__run_id="streamed", training__residency="streamed", **options), sinks=[])
    assert len(moved) == 1


def test_a_stack_that_joins_streamed_ones_waits_in_host_memory(tiny):
    rack = Rack(rack_spec(tiny(model__vocab_size=9), 2))
    reside(rack, torch.device("meta"), frozen="streamed", trained="streamed")
    grown, _ = grow(rack, Growth("append", 1, "copy"), seed=0)
    assert grown.device.type == "meta"
    source = rack.stacks[1].blocks[0].state_dict()
    for name, tensor in grown.stacks[2].blocks[0].state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, source[name])


@pytest.mark.parametrize(
    ("first", "then"),
    [({}, STREAMED), (STREAMED, STREAMED), (STREAMED, {})],
    ids=["to host", "on host", "back"],
)
def test_a_run_goes_on_where_it_stopped_or_elsewhere(tiny, monkeypatch, first, then):
    options = {"training__max_steps": 4}
    whole = train(tiny(training__run_id="whole", **options), sinks=[])

    class Killed(BaseException):
        pass

    original = Engine._train_step

    def step(self, stage):
        if self.progress.step == 7:
            raise Killed
        original(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_train_step", step)
        with pytest.raises(Killed):
            train(tiny(training__run_id="parts", **options, **first), sinks=[])
    rest = train(tiny(training__run_id="parts", **options, **then), sinks=[])
    assert rest["resumed_from"] is not None
    assert hashes(rest) == hashes(whole)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"memory": "int8"},
        {"memory": "int8_nomaster"},
        {"memory": "fused"},
        {"optimizer_type": "Muon", "state_device": "host"},
    ],
    ids=str,
)
def test_optimizers_of_every_kind_update_streamed_weights(tiny, optimizer):
    options = {"training__max_steps": 2, "model__d_model": 64, "training__progressive__enabled": False}
    options |= {f"training__optimizer__{key}": value for key, value in optimizer.items()}
    if optimizer.get("memory") == "fused":
        options["training__max_grad_norm"] = 0  # there is no norm over all gradients
    resident = train(tiny(training__run_id="resident", **options), sinks=[])
    streamed = train(tiny(training__run_id="streamed", **options, **STREAMED), sinks=[])
    assert hashes(streamed) == hashes(resident)
    assert losses(streamed) == losses(resident)
