"""`stackwise eval RUN --depth`: what it keeps, prints and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from stackwise.cli.main import main

KEY = "training.progressive"
KINDS = {
    "deep": [f"{KEY}.building_mode=independent", f"{KEY}.training_objective=diffusion"],
    "encoder": [f"{KEY}.enabled=false", f"{KEY}.training_objective=mlm"],
    "noisy": [
        f"{KEY}.enabled=false",
        f"{KEY}.training_objective=diffusion",
        "objective.corruption=gaussian",
        "objective.predict=noise",
    ],
}


@pytest.fixture(scope="module")
def trained_kinds(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth") / "work"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda fd: None)
        for name, words in KINDS.items():
            both_ways = ["model.attention_preset=bert_style", "--quiet"]
            assert main(["train", "tiny.yaml", f"training.run_id={name}", *words, *both_ways]) == 0
    return folder


@pytest.fixture
def work(trained_kinds: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained_kinds)
    return trained_kinds


def figures(value: object) -> list[float]:
    """All numbers in a tree."""
    if isinstance(value, (dict, list)):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in figures(item)]
    return [value] if isinstance(value, float) else []


def test_the_figures_are_kept_printed_and_those_of_eval(cli, run_folder):
    whole = json.loads(cli("eval", "tiny", "--json").out)
    done = cli("eval", "tiny", "--depth", "--batches", "1000", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert json.loads(Path("runs/tiny/depth.json").read_text()) == record
    assert (record["commit"], record["step"]) == (whole["commit"], whole["step"])
    assert record["protocol"]["windows"] == whole["windows"]
    assert set(record["versions"]) == {"stackwise", "torch", "python"}
    (view,) = record["views"]
    assert view["loss"] == view["stacks"][-1]["exit"] == pytest.approx(whole["nats_per_token"], rel=1e-7)
    text = cli("eval", "tiny", "--depth", "--batches", "1000").out
    assert f"all rows: loss {view['loss']:.4f} nats per token (exact)" in text
    for stack in view["stacks"]:
        assert f"{stack['removed']:+.4f}" in text
        assert f"{stack['gradient']:.4f}" in text
    assert "linear CKA" in text
    assert "exit after it        loss that final norm and head read" in text
    assert text.count("in the owner's place") == 0


def test_batches_choose_the_windows_and_the_batch_size_nothing(cli, run_folder):
    one, other = (
        json.loads(cli("eval", "tiny", "--depth", "--batches", "3", "--batch-size", size, "--json").out)
        for size in "15"
    )
    assert one["protocol"] == other["protocol"]
    assert one["protocol"]["windows"] == 3 * 2
    assert figures(one["views"]) == pytest.approx(figures(other["views"]), rel=1e-5, abs=1e-6)


def test_where_depth_is_time_every_stack_is_asked_on_every_interval(cli, work):
    record = json.loads(cli("eval", "deep", "--depth", "--batches", "2", "--json").out)
    assert [view["noise"] for view in record["views"]] == [[0, 0.5], [0.5, 1]]
    assert [view["owner"] for view in record["views"]] == [1, 0]
    assert all(view["alone"] and len(view["stacks"]) == 2 for view in record["views"])
    text = cli("eval", "deep", "--depth", "--batches", "2").out
    assert "0 to 0.5 hidden, answered by s" in text
    assert "in the owner's place" in text


@pytest.mark.parametrize(
    ("run", "unit"),
    [("encoder", "nats per hidden token"), ("noisy", "squared error"), ("deep", "nats per token")],
)
def test_the_unit_is_named(cli, work, run, unit):
    record = json.loads(cli("eval", run, "--depth", "--batches", "1", "--json").out)
    assert record["protocol"]["unit"] == unit
    assert all(n == n for n in figures(record["views"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batches", "2"], "--batches goes with --depth"),
        (["--depth", "--by-time"], "--by-time is not for --depth"),
        (["--depth", "--limit", "2"], "--limit goes with --tasks"),
        (["--tasks", "x.jsonl", "--depth"], "--depth is not for --tasks"),
        (["--depth", "--batches", "0"], "--batches"),
        (["--depth", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_options_that_mean_nothing_are_refused(cli, run_folder, words, said):
    done = cli("eval", "tiny", *words)
    assert done.code == 2, done.err
    assert said in done.err
    assert not Path("runs/tiny/depth.json").exists()
