"""`stackwise demo`, cut down to a few steps on a little text."""

from __future__ import annotations

import json
import re

import pytest

from stackwise.cli.demo import Outcome, control
from stackwise.curriculum.costs import stage_flops
from stackwise.curriculum.curricula import stages
from stackwise.model.describe import rack_spec
from stackwise.training import run as training_run
from stackwise.training.errors import Interrupted

SMALL = [
    "model.d_model=16", "model.max_seq_len=16", "training.seq_len=16", "training.batch_size=2", "training.max_steps=4",
    "training.dtype=float32", "data.max_bytes=40000", "evaluation.batches=1", "generation.max_new_tokens=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Drawing takes longer than everything else here and is tested with the report."""
    monkeypatch.setattr("stackwise.tracking.plots.available_plots", lambda run: [])


def test_the_demo_grows_to_four_stacks_and_says_what_to_type_next(cli, folder):
    result = cli("demo", *SMALL)
    assert result.code == 0, result.err
    table = result.out[result.out.index("The model as it grew") :]
    for number in (2, 3, 4):
        assert re.search(
            rf"^ {number} stack {number} +{number} .+ \d\.\d{{4}} +\d\.\d{{4}} +\d\.\d{{4}} ",
            table,
            re.MULTILINE,
        )
    assert re.search(r"^ 5 joint +4 ", table, re.MULTILINE)
    assert "    def " in table, "a sample"
    next_lines = table[table.index("\nNext\n") :].splitlines()
    assert [line for line in next_lines if "stackwise generate runs/demo" in line]
    assert [line for line in next_lines if "stackwise train my.yaml" in line]
    assert "Report  runs/demo/report.html" in table
    names = {path.name for path in (folder / "runs/demo").iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "tokenizer.json",
        "store",
        "report.html",
        "sample.txt",
    } <= names


def test_compare_trains_two_controls_of_the_same_compute(cli, folder):
    result = cli("demo", *SMALL, "training.max_steps=16", "--compare", "--out", "there")
    assert result.code == 0, result.err
    flops = {}
    for name in ("demo", "demo-end-to-end", "demo-shallow"):
        events = [
            json.loads(line) for line in (folder / "there" / name / "metrics.jsonl").read_text().splitlines()
        ]
        flops[name] = events[-1]["flops"]
    assert flops["demo-end-to-end"] == pytest.approx(flops["demo"], rel=0.05)
    assert flops["demo-shallow"] == pytest.approx(flops["demo"], rel=0.05)
    table = result.out[result.out.index("The same compute, spent in three ways") :]
    for label in ("grown stack by stack", "final model, end to end", "first stage's model, no growth"):
        assert re.search(
            rf"^ {label} +[\d.]+ k +\d\.\d{{4}} +[\d.]+ \wFLOP +[\d.]+ k +\d+ +[\d.]+ \wB",
            table,
            re.MULTILINE,
        )


def test_the_controls_are_the_final_model_and_the_first_one(cli, folder):
    assert cli("demo", *SMALL).code == 0
    run = folder / "runs/demo"
    grown = Outcome("", run, {"flops": 1e9, "architecture": {"n_stacks": 4}}, None)
    deep, shallow = control(grown, "a", only_first=False), control(grown, "b", only_first=True)
    assert len(rack_spec(deep).blocks) == 5
    assert len(rack_spec(shallow).blocks) == 2
    assert not rack_spec(deep).tied
    for config in (deep, shallow):
        (stage,), (cost,) = stages(config), stage_flops(config, stages(config))
        assert abs(cost - 1e9) <= cost / stage.steps / 2


def test_a_finished_demo_is_made_anew_and_an_interrupted_one_continued(cli, folder, monkeypatch):
    original = training_run.train
    calls = []

    def stopped(config, **options):
        calls.append(config.checkpoint.overwrite)
        result = original(config, **options)
        if len(calls) == 1:
            metrics = folder / "runs/demo/metrics.jsonl"
            metrics.write_text(metrics.read_text().replace('"status":"done"', '"status":"stopped"'))
            raise Interrupted(2, "stopped after step 3 (stack 1); the state is saved")
        return result

    monkeypatch.setattr(training_run, "train", stopped)
    first = cli("demo", *SMALL)
    assert first.code == 130
    assert first.err == (
        f"stopped after step 3 (stack 1); the state is saved. To continue:\n  stackwise demo {' '.join(SMALL)}\n"
    )
    assert cli("demo", *SMALL).code == 0
    assert cli("demo", *SMALL).code == 0
    assert calls == [True, False, True], "whether the folder is emptied first"


def test_an_interrupted_demo_of_other_settings_is_replaced(cli, folder):
    assert cli("demo", *SMALL).code == 0
    metrics = folder / "runs/demo/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"status":"done"', '"status":"stopped"'))
    result = cli("demo", *SMALL, "training.seed=3")
    assert result.code == 0
    assert "note: the interrupted demo had other settings; starting a new one" in result.err
