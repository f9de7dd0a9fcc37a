"""Runs that save beside the training: the same bytes, the same numbers, and errors that arrive."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from stackwise.checkpoint.errors import CheckpointError, SpaceError
from stackwise.checkpoint.store import Store
from stackwise.storage import ops
from stackwise.training.keeper import RunKeeper
from stackwise.training.run import train
from stackwise.training.stepping import Stepping


def events_of(result, kind):
    with open(f"{result['run_dir']}/metrics.jsonl") as lines:
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def parts_by_step(result):
    return {
        c.step: {n: p.sha256 for n, p in c.parts.items()}
        for c in Store(f"{result['run_dir']}/store").commits()
    }


def test_saving_beside_the_training_changes_nothing(tiny):
    runs = {
        key: train(
            tiny(training__run_id=str(key), checkpoint__asynchronous=key, checkpoint__save_interval=2, checkpoint__keep_last=99),
            sinks=[],
        )
        for key in (True, False, "auto")
    }  # fmt: skip
    assert parts_by_step(runs[True]) == parts_by_step(runs[False]) == parts_by_step(runs["auto"])
    for result in runs.values():
        saves = events_of(result, "checkpoint")
        assert [event["step"] for event in saves] == sorted(parts_by_step(result))
        assert all(event["blocked_seconds"] <= event["seconds"] for event in saves)


def test_auto_copies_only_what_is_small_where_the_device_is_the_processor(tiny, monkeypatch):
    seen = []
    original = RunKeeper.save

    def save(self, engine, pin, since):
        seen.append(self.saver.asynchronous)
        original(self, engine, pin, since)

    monkeypatch.setattr(RunKeeper, "save", save)
    train(tiny(training__run_id="small"), sinks=[])
    assert set(seen) == {True}
    seen.clear()
    monkeypatch.setattr("stackwise.training.keeper._COPY_ON_CPU", 1000)
    train(tiny(training__run_id="large"), sinks=[])
    assert set(seen) == {False}


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_full_disk_stops_the_run_or_is_noted(tiny, monkeypatch, policy):
    original, failed = ops.write, []

    def write(fd, data):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if "/store/tmp/object-" in path:
            commits = os.path.join(os.path.dirname(os.path.dirname(path)), "commits")
            if not failed and os.listdir(commits):
                failed.append(path)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(fd, data)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(ops, "write", write)
    config = tiny(checkpoint__save_interval=2, checkpoint__on_save_error=policy, checkpoint__keep_last=99)
    if policy == "stop":
        with pytest.raises(SpaceError):
            train(config, sinks=[])
        commit = Store(f"{config.checkpoint.dir}/tiny/store").latest()
        assert commit is not None
        monkeypatch.setattr(ops, "write", original)
        resumed = train(config, sinks=[])
        assert resumed["resumed_from"] == commit.id
        return
    result = train(config, sinks=[])
    notes = [
        event["message"] for event in events_of(result, "note") if "could not be saved" in event["message"]
    ]
    assert notes
    assert "no space to write" in notes[0]
    assert max(parts_by_step(result)) == result["steps"]


def test_a_frozen_weight_that_moves_stops_the_run_before_it_is_saved(tiny, monkeypatch):
    original = Stepping._train_step

    def step(self, stage):
        original(self, stage)
        if self.progress.stage == 1 and self.progress.stage_step == 2:
            with torch.no_grad():
                frozen = next(p for p in self.rack.stacks[0].parameters() if not p.requires_grad)
                frozen.view(-1)[0] += 1e-3

    monkeypatch.setattr(Stepping, "_train_step", step)
    with pytest.raises(
        CheckpointError, match=r"'stack:s0/weights' is frozen, yet its bytes changed \(stacks\.s0"
    ):
        train(tiny(checkpoint__save_interval=1), sinks=[])
