"""`stackwise eval` on runs that are not causal: what each figure is, and what it is held against."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from stackwise.cli.main import main

KEY = "training.progressive"
DEEP = [f"{KEY}.building_mode=independent", f"{KEY}.training_objective=diffusion"]
WHOLE = [f"{KEY}.enabled=false"]
TRAINED = {
    "diffused": [*WHOLE, f"{KEY}.training_objective=diffusion", "evaluation.batches=null"],
    "deep": DEEP,
    "points": [*DEEP, f"{KEY}.time_step_mask_fractions=[0.3,0.8]"],
    "encoder": [*WHOLE, f"{KEY}.training_objective=mlm"],
    "noisy": [*WHOLE, f"{KEY}.training_objective=diffusion", "objective.corruption=gaussian"],
}


@pytest.fixture(scope="module")
def trained_masked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, and the causal run tiny."""
    folder = tmp_path_factory.mktemp("masked_eval") / "work"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda fd: None)
        for name, words in TRAINED.items():
            both_ways = ["model.attention_preset=bert_style", "--quiet"]
            assert main(["train", "tiny.yaml", f"training.run_id={name}", *words, *both_ways]) == 0
    return folder


@pytest.fixture
def masked(trained_masked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained_masked)
    return trained_masked


def test_a_diffusion_run_has_a_bound_in_parts(cli, masked):
    facts = [
        json.loads(cli("eval", "diffused", "--batch-size", size, "--json").out)["bound"] for size in "17"
    ]
    assert facts[0]["nats_per_token"] == pytest.approx(facts[1]["nats_per_token"], abs=1e-6)
    assert facts[0]["label"] == "bound"
    assert [part["high"] for part in facts[0]["parts"]] == [0.25, 0.5, 0.75, 1]
    text = cli("eval", "diffused").out
    assert f"at most {facts[0]['nats_per_token']:.4f} ± {facts[0]['standard_error']:.4f}" in text
    assert "nats per token (bound)" in text
    assert "reference         uniform 3.367" in text  # 29 characters
    assert "0.25 to 0.5" in text


def test_the_bound_is_near_the_one_that_training_estimated(cli, masked):
    """By other masks of the same windows."""
    events = [json.loads(line) for line in Path("runs/diffused/metrics.jsonl").read_text().splitlines()]
    final = next(event for event in events if event.get("when") == "final")
    facts = json.loads(cli("eval", "diffused", "--json").out)["bound"]
    assert facts["nats_per_token"] == pytest.approx(final["loss"], abs=6 * facts["standard_error"])


def test_the_bound_can_be_checked_over_times(cli, masked):
    facts = json.loads(cli("eval", "diffused", "--by-time", "--json").out)
    assert facts["by_time"]["estimator"] == "t"
    assert facts["by_time"]["nats_per_token"] != facts["bound"]["nats_per_token"]
    assert f"{facts['by_time']['nats_per_token']:.4f} ± " in cli("eval", "diffused", "--by-time").out


def test_stacks_that_own_intervals_have_a_part_each(cli, masked):
    bound = json.loads(cli("eval", "deep", "--json").out)["bound"]
    assert [(part["low"], part["high"]) for part in bound["parts"]] == [(0, 0.5), (0.5, 1)]
    total = sum(part["nats_per_token"] for part in bound["parts"])
    assert total == pytest.approx(bound["nats_per_token"], rel=1e-9)


def test_point_masks_have_scores_of_each_stack_and_no_bound(cli, masked):
    facts = json.loads(cli("eval", "points", "--json").out)
    assert "bound" not in facts
    assert [scores["share"] for scores in facts["masked"]] == pytest.approx([0.3, 0.8], abs=0.04)
    assert cli("eval", "points").out.count("masked accuracy") == 2


def test_an_encoder_has_pseudo_figures_beside_the_unigram(cli, masked):
    facts = json.loads(cli("eval", "encoder", "--json", "--pseudo-windows", "2").out)
    assert facts["masked"][0]["label"] == facts["pseudo_perplexity"]["label"] == "pseudo"
    assert facts["pseudo_perplexity"]["windows"] == 2
    assert set(facts["reference"]) == {"uniform", "unigram", "unigram_accuracy"}
    text = cli("eval", "encoder", "--pseudo-windows", "2").out
    assert f"{facts['pseudo_perplexity']['pseudo_perplexity']:.3f} (pseudo)" in text
    assert f"the commonest token: {facts['reference']['unigram_accuracy']:.2%}" in text
    assert "bound" not in text
    assert "(exact)" in text  # the reference lines


def test_noise_on_embeddings_has_a_held_out_loss_alone(cli, masked):
    facts = json.loads(cli("eval", "noisy", "--json").out)
    assert facts["held_out"]["label"] == "pseudo"
    assert f"loss              {facts['held_out']['loss']:.4f} nats (pseudo)" in cli("eval", "noisy").out


def test_options_that_say_nothing_about_a_run_are_refused(cli, masked):
    for run, option, message in (
        ("tiny", ["--by-time"], "--by-time is for runs whose loss is a bound, and that of this run is exact"),
        ("encoder", ["--by-time"], "that of this run is pseudo"),
        ("diffused", ["--pseudo-windows", "2"], "mlm, or diffusion at point masks"),
    ):
        refused = cli("eval", run, *option)
        assert refused.code == 2
        assert message in refused.err


@pytest.mark.parametrize(("run", "noted"), [("diffused", True), ("tiny", False)])
def test_a_run_that_hides_tokens_begins_with_its_reference_lines(masked, run, noted):
    events = [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]
    notes = [e["message"] for e in events if e["event"] == "note" and "unigram" in e["message"]]
    assert len(notes) == int(noted)
    if noted:
        assert notes[0].startswith("without context: uniform 3.367, unigram ")


def test_any_text_can_be_measured(cli, masked):
    (masked / "other.txt").write_text((masked / "text.txt").read_text()[5:205])
    for run, key in (("diffused", "bound"), ("encoder", "pseudo_perplexity"), ("noisy", "held_out")):
        facts = json.loads(cli("eval", run, "--text", "other.txt", "--json").out)
        assert key in facts
        assert facts["data"]["bytes"] == 200
    assert "(counted in this text)" in cli("eval", "diffused", "--text", "other.txt").out
    refused = cli("eval", "encoder", "--stride", "4")
    assert (refused.code, "--stride is for causal runs" in refused.err) == (2, True)
