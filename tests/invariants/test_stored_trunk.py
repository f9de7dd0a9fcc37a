"""Runs that keep the outputs of their frozen trunk: the same losses, stopped and resumed at any step."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from stackwise.checkpoint.store import Store
from stackwise.training.errors import Interrupted
from stackwise.training.loop import Engine
from stackwise.training.run import train

KEYS = "training__progressive__"


@pytest.fixture
def run(tiny, tmp_path):
    """Train a tiny append run with keys of `training.progressive`; the hashes of its parts, and its events."""

    def do(run_id: str, **keys):
        given = {"cache_dir": str(tmp_path / f"cache-{run_id}"), **keys}
        options = {f"{KEYS}{name}": value for name, value in given.items()}
        config = tiny(training__run_id=run_id, training__max_steps=6, **options)
        folder = Path(train(config, sinks=[])["run_dir"])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        commit = Store(folder / "store").latest()
        return {name: part.sha256 for name, part in commit.parts.items()}, [
            json.loads(line) for line in lines
        ]

    return do


def losses(events):
    return [(e["step"], e["loss"]) for e in events if e["event"] in ("step", "eval")]


def notes(events):
    return [e["message"] for e in events if e["event"] == "note" and "frozen trunk" in e["message"]]


@pytest.mark.parametrize("ram", [0, 5000, 10**9], ids=["disk", "both", "memory"])
def test_float32_stores_change_no_bit_of_a_run(run, ram):
    plain, without = run("plain", cache_activations=False)
    stored, with_store = run("stored", cache_activations=True, cache_dtype="float32", cache_ram_bytes=ram)
    assert stored == plain
    assert losses(with_store) == losses(without)
    assert all("computed at every visit" in note for note in notes(without))
    stored = [note.startswith("frozen trunk stored: ") for note in notes(with_store)]
    assert stored == [False, True, True, False], "the first stage and the joint phase train everything"


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("fp8", 5e-2)])
def test_rounded_stores_change_the_losses_a_little(run, dtype, bound):
    _, without = run("plain", cache_activations=False)
    _, with_store = run("stored", cache_activations=True, cache_dtype=dtype)
    pairs = list(zip(losses(without), losses(with_store), strict=True))
    worst = max(abs(a[1] - b[1]) for a, b in pairs)
    assert 0 < worst < bound


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_what_there_is_room_for_changes_no_bit(run, dtype):
    wide, _ = run("wide", cache_activations=True, cache_dtype=dtype)
    tight, _ = run(
        "tight", cache_activations=True, cache_dtype=dtype, cache_ram_bytes=3000, cache_max_bytes=6000
    )
    none, _ = run("none", cache_activations=True, cache_dtype=dtype, cache_ram_bytes=0, cache_max_bytes=1)
    assert wide == tight == none


@pytest.mark.parametrize("choice", ["auto", True])
@pytest.mark.parametrize("ram", [0, 10**9], ids=["disk", "memory"])
@pytest.mark.parametrize("n", [7, 9, 12, 13, 17])
def test_a_resumed_run_is_the_uninterrupted_one(run, monkeypatch, n, ram, choice):
    """Stops within a stage that reads a store, at its end, and within the next one, which is filled from it."""
    keys = {"cache_activations": choice, "cache_ram_bytes": ram}
    whole, _ = run("whole", **keys)
    after = Engine._after_step

    def stop(self, stage):
        after(self, stage)
        if self.progress.step == n:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Engine, "_after_step", stop)
    with pytest.raises(Interrupted):
        run("parts", **keys)
    resumed, _ = run("parts", **keys)
    assert resumed == whole


def test_an_illegal_wish_is_told_with_its_reason(run):
    _, events = run("joint", cache_activations=True)
    told = [note for note in notes(events) if "computed at every visit: the embedding trains" in note]
    assert len(told) == 2
    _, events = run("tied", cache_activations="auto")
    assert len(notes(events)) == 2, "auto speaks only where there is a frozen trunk"


@pytest.mark.parametrize("joint", [True, False])
def test_a_finished_run_leaves_no_store_behind(run, tmp_path, joint):
    run("done", cache_activations=True, cache_ram_bytes=0, joint_tuning=joint)
    assert list((tmp_path / "cache-done").iterdir()) == []
