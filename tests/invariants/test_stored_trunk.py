"""Runs that keep the outputs of their frozen trunk: the same losses, stopped and resumed at any step."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from threading import current_thread

import pytest

from stackwise.checkpoint.store import Store
from stackwise.training.errors import Interrupted
from stackwise.training.loop import Engine
from stackwise.training.run import train
from stackwise.trunk.disk import DiskStore

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


def stored_figures(events):
    """By stage; but for the bytes on disk, whose header tells the time."""
    ends = [(e["stage"], e["stored"] or {}) for e in events if e["event"] == "stage_end"]
    return {stage: {name: n for name, n in found.items() if name != "disk_bytes"} for stage, found in ends}


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
    whole, events = run("whole", **keys)
    after = Engine._after_step

    def stop(self, stage):
        after(self, stage)
        if self.progress.step == n:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Engine, "_after_step", stop)
    with pytest.raises(Interrupted):
        run("parts", **keys)
    resumed, later = run("parts", **keys)
    assert resumed == whole
    if ram == 0:  # nothing was lost with the process
        assert stored_figures(later) == stored_figures(events)


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


@pytest.mark.parametrize("micro", [1, 2])
def test_what_lies_on_disk_is_read_while_gradients_are_computed(tiny, tmp_path, monkeypatch, micro):
    """In every pass after the first, by another thread than the one that trains; no number depends on it."""
    short = tmp_path / "short.txt"
    short.write_text("to be or not to be, that is the question: " * 18)
    by: list[tuple[int, str]] = []
    get, where = DiskStore.get, {"pass": 0}
    step = Engine._train_step

    def watched_get(self, entry, out):
        by.append((where["pass"], current_thread().name.partition("_")[0]))
        return get(self, entry, out)

    def watched_step(self, stage):
        where["pass"] = self.progress.stage_step * 3 * micro // self.loader.rows
        step(self, stage)

    monkeypatch.setattr(DiskStore, "get", watched_get)
    monkeypatch.setattr(Engine, "_train_step", watched_step)

    def history(**keys):
        config = tiny(
            data__path=str(short),
            model__architecture__n_stacks=2,
            training__run_id="".join(keys),
            training__gradient_accumulation_steps=micro,
            training__max_steps=40 // micro,
            training__progressive__joint_tuning=False,
            training__progressive__cache_dtype="float32",
            training__progressive__cache_dir=str(tmp_path / "cache"),
            **{f"{KEYS}{name}": value for name, value in keys.items()},
        )
        return train(config, sinks=[])["training_history"]

    room = 8 * 3 * 16 * 16 * 4  # an eighth of it holds a batch
    stored = history(cache_activations=True, cache_ram_bytes=room)
    later = {thread for number, thread in by if number > 0}
    assert len(by) > 20
    assert later == {"activations"}
    plain = history(cache_activations=False)
    assert [entry["loss_last"] for entry in stored] == [entry["loss_last"] for entry in plain]
    first, figures = (entry["stored"] for entry in stored)
    assert first is None
    assert figures["entries"] + figures["hits"] == 120, "a visit writes the row, or reads it"
    assert figures["ram_bytes"] <= room < figures["ram_bytes"] + figures["disk_bytes"]
    assert figures["ram_bytes"] + figures["disk_bytes"] >= figures["entries"] * 16 * 16 * 4
    assert [entry["stored"] for entry in plain] == [None, None]
