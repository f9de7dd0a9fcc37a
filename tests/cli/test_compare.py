"""`stackwise compare`: the same budget for all, runs that are kept, one page, and what may not be compared."""

from __future__ import annotations

import json
import re

import pytest

from stackwise.cli.compare_entries import entries_of
from stackwise.training import run as training_run
from stackwise.training.errors import Interrupted

WHOLE = "tiny.yaml training.run_id=whole training.progressive.enabled=false"


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Drawing takes longer than everything else here and is tested with the pages."""
    monkeypatch.setattr("stackwise.tracking.group_report.group_plots", lambda groups: [])
    monkeypatch.setattr("stackwise.planning.scaling.gallery", lambda title, plots: "")


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that were trained, in order."""
    names, original = [], training_run.train

    def train(config, **options):
        names.append(config.training.run_id)
        return original(config, **options)

    monkeypatch.setattr(training_run, "train", train)
    return names


def events_of(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_all_runs_cost_what_the_first_config_costs(cli, folder):
    result = cli("compare", "tiny.yaml", WHOLE, "training.max_steps=12", "--seeds", "2", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    out = folder / "runs" / "compare"
    flops = {name: events_of(out, f"{name}-s42")[-1]["flops"] for name in ("tiny", "whole")}
    assert flops["whole"] == pytest.approx(flops["tiny"], rel=0.03)
    for one, name in zip(told["configs"], ("tiny", "whole"), strict=True):
        losses = []
        for run, seed in zip(one["runs"], (42, 43), strict=True):
            assert run["path"] == f"runs/compare/{name}-s{seed}"
            losses.append([e for e in events_of(out, f"{name}-s{seed}") if e["event"] == "eval"][-1]["loss"])
        assert one["loss"] == {
            "mean": pytest.approx(sum(losses) / 2), "low": min(losses), "high": max(losses), "count": 2,
        }  # fmt: skip
        assert losses[0] != losses[1], "another seed is another run"
    assert told["laws"] == []
    assert told["differences"]["training.progressive.enabled"] == [True, False]
    page = (out / "comparison.html").read_text()
    assert told["page"] == "runs/compare/comparison.html"
    for one in told["configs"]:
        assert f"{one['loss']['mean']:.4f}<small>" in page


def test_runs_that_are_done_are_kept_and_new_ones_added(cli, folder, trained):
    words = ("compare", "tiny.yaml", WHOLE, "--tokens", "200", "--plain")
    assert cli(*words).code == 0
    assert trained == ["tiny-s42", "whole-s42"]
    trained.clear()
    result = cli(*words, "--seeds", "2")
    assert result.code == 0, result.err
    assert trained == ["tiny-s43", "whole-s43"]
    assert "Run 1 of 4: tiny-s42, done before" in result.err
    assert re.search(r"^ tiny +2 ", result.out, re.MULTILINE)


def test_an_interrupted_comparison_goes_on(cli, folder, monkeypatch):
    original, calls = training_run.train, []

    def stopped(config, **options):
        calls.append(config.training.run_id)
        if len(calls) == 2:
            raise Interrupted(2, "stopped after step 3; the state is saved")
        return original(config, **options)

    monkeypatch.setattr(training_run, "train", stopped)
    words = ("compare", "tiny.yaml", WHOLE, "--seeds", "2", "--out", "there")
    result = cli(*words)
    assert result.code == 130
    assert "To continue:\n  stackwise compare tiny.yaml 'tiny.yaml training.run_id=whole " in result.err
    assert cli(*words).code == 0
    assert calls == ["tiny-s42", "tiny-s43", "tiny-s43", "whole-s42", "whole-s43"]


def test_a_run_that_fails_does_not_stop_the_others(cli, folder):
    broken = "tiny.yaml training.run_id=broken training.optimizer.lr=1e30 training.max_grad_norm=0"
    result = cli("compare", "tiny.yaml", broken, WHOLE, "--plain")
    assert result.code == 5, result.err
    assert re.search(r"^broken-s42 failed: .", result.err, re.MULTILINE)
    assert re.search(r"^ whole +1 ", result.out, re.MULTILINE)
    assert re.search(r"^ broken +failed ", result.out, re.MULTILINE)
    assert "note: Not every run is done: broken is failed." in result.err
    assert "broken is failed" in (folder / "runs/compare/comparison.html").read_text()


def test_a_sweep_is_fitted_and_too_few_sizes_are_said(cli, folder):
    words = ("compare", "tiny.yaml", "--tokens", "100", "--json", "--sweep")
    told = json.loads(cli(*words, "model.d_model=8,16,24,32", "--sweep", "model.n_heads=1,2,3,4").out)
    (law,) = told["laws"]
    assert (law["label"], law["over"], len(law["points"])) == ("tiny", "params", 4)
    assert law["law"]["exponent"]["low"] <= law["law"]["exponent"]["value"] <= law["law"]["exponent"]["high"]
    labels = [one["config"] for one in told["configs"]]
    assert labels[0] == "tiny-d_model-8-n_heads-1"
    assert "L(N)" in (folder / "runs/compare/comparison.html").read_text()
    told = json.loads(cli(*words, "model.d_model=8,16").out)
    assert told["laws"][0]["law"] is None
    assert "at least 4 are needed" in told["laws"][0]["problem"]


def test_several_budgets_are_a_law_of_one_config(cli, folder):
    result = cli("compare", WHOLE, "--tokens", "100,200,300,400", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    (law,) = told["laws"]
    assert (law["label"], law["over"]) == ("whole", "tokens")
    assert [one["budget"] for one in told["configs"]] == [100, 200, 300, 400]
    assert (folder / "runs/compare/whole-400-s42").is_dir()


def test_a_budget_that_steps_cannot_meet_is_said(cli, folder):
    result = cli("compare", "tiny.yaml", WHOLE, "training.progressive.joint_tuning=false", "--tokens", "96")
    assert result.code == 0, result.err
    assert "note: tiny cost +33.3% of the budget" in result.err
    assert "whole cost" not in result.err
    assert "tiny cost +33.3% of the budget" in (folder / "runs/compare/comparison.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny.yaml"], "there is nothing to compare"),
        (["tiny.yaml", "tiny.yaml"], "two configs are called 'tiny'"),
        (["tiny.yaml", WHOLE, "--flops", "1e6", "--tokens", "5"], "exclude each other"),
        (["tiny.yaml", WHOLE, "--flops", "many"], "--flops 'many': write numbers"),
        (["tiny.yaml", WHOLE, "--tokens", "0"], "must be above 0"),
        (["tiny.yaml", WHOLE, "--tokens", "5,5"], "and different"),
        (["tiny.yaml", WHOLE, "--tokens", "2"], "a run of the fewest steps costs"),
        (["tiny.yaml", "tiny.yaml seed"], "'seed' in 'tiny.yaml seed' is no override"),
        (["tiny.yaml", "tiny.yaml training.seed=3"], "--seeds chooses the seeds"),
        (["tiny.yaml", WHOLE, "checkpoint.dir=x"], "--out DIR names the folder"),
        (["tiny.yaml", WHOLE, "training.run_id=x"], "names one config"),
        (["tiny.yaml", "tiny.yaml 'training"], "cannot be read"),
        (["tiny.yaml", "tini.yaml"], "no configuration file 'tini.yaml'"),
        (["tiny.yaml", "--sweep", "model.d_model"], "write KEY=VALUE,VALUE"),
        (["tiny.yaml", "--sweep", "model.d_model=8"], "has one value"),
        (["tiny.yaml", "--sweep", "model.d_model=8,16", "--sweep", "model.n_heads=1,2,4"], "their counts differ"),
        (["tiny.yaml", "--sweep", "training.seed=1,2"], "cannot be swept: --seeds"),
        (["tiny.yaml", "tiny.yaml training.seq_len=8"], "tiny-seq_len-8: training.seq_len: tiny is evaluated with another"),
        (["tiny.yaml", "tiny.yaml data.tokenizer=byte"], "compare bits per byte"),
        (["tiny.yaml", "tiny.yaml data.eval_fraction=0.3"], "held-out text: not the text of tiny"),
        (["tiny.yaml", "tiny.yaml training.progressive.training_objective=mlm"], "they are not the same measure"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_trains(cli, folder, trained, words, message):
    result = cli("compare", *words)
    assert result.code == 2
    assert message in result.err
    assert trained == []


def test_of_another_objective_only_that_is_said(cli, folder):
    refused = cli("compare", "tiny.yaml", "tiny.yaml training.progressive.training_objective=mlm").err
    assert "evaluation.passes" not in refused
    diffusion = "training.progressive.training_objective=diffusion"
    others = [
        f"tiny.yaml training.run_id={name} {diffusion} {keys}"
        for name, keys in (("a", ""), ("b", "evaluation.passes=9"))
    ]
    assert "b: evaluation.passes: a is evaluated with another value" in cli("compare", *others).err


def test_a_stored_run_of_other_settings_is_not_taken(cli, folder, trained):
    assert cli("compare", "tiny.yaml", WHOLE, "--tokens", "200").code == 0
    trained.clear()
    result = cli("compare", "tiny.yaml", WHOLE, "--tokens", "400")
    assert result.code == 2
    assert "tiny-s42 holds a run of other settings (training.max_steps); choose another --out" in result.err
    result = cli("compare", "tiny.yaml", WHOLE, "--tokens", "200", "evaluation.batches=2")
    assert "(evaluation.batches)" in result.err
    assert trained == []


def test_configs_are_named_by_what_tells_them_apart(folder):
    words = ["tiny.yaml", "tiny.yaml training.optimizer.lr=1e-2", WHOLE, "training.batch_size=3"]
    entries = entries_of(words, ["model.d_model=8,16"], folder / "x", 1)
    assert [entry.label for entry in entries] == [
        f"{family}-d_model-{width}" for family in ("tiny", "tiny-lr-1e_2", "whole") for width in (8, 16)
    ]
    assert {entry.config.training.batch_size for entry in entries} == {3}
    assert [entry.config.training.optimizer.lr for entry in entries[::2]] == [
        entries[0].config.training.optimizer.lr, 1e-2, entries[0].config.training.optimizer.lr,
    ]  # fmt: skip
    assert [entry.family for entry in entries[::2]] == ["tiny", "tiny-lr-1e_2", "whole"]
