"""What each verb prints and leaves behind."""

from __future__ import annotations

import json
import re
import sys
import warnings

import pytest
import yaml

from stackwise.config.presets import preset_names
from stackwise.config.root import StackWiseConfig
from stackwise.config.schema import schema_rows
from stackwise.data.tokenizers import load_tokenizer

VERBS = [
    "demo", "train", "plan", "generate", "fill", "embed", "chat", "eval", "report", "info", "runs", "cache", "config show", "config validate",
    "config schema", "tokenizer train", "data prepare", "import", "export",
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb, cli):
    result = cli(*verb.split(), "--help")
    assert result.code == 0
    assert f"Examples:\n    stackwise {verb}" in result.out
    assert not result.err


def test_help_lists_every_verb_in_one_line_each(cli):
    text = cli("--help").out
    for verb in {verb.split()[0] for verb in VERBS}:
        assert re.search(rf"^  {verb} +\w.*\.$", text, re.MULTILINE), verb
    assert cli("-h").out == text
    assert cli() == (2, "", text), "without arguments it helps too"


def test_version(cli):
    assert re.fullmatch(r"stackwise \d+\.\d+\.\d+\n", cli("--version").out)


# config ------------------------------------------------------------------------------------------------------------


def test_show_prints_a_configuration_that_means_the_same(cli, folder):
    result = cli("config", "show", "tiny.yaml", "training.optimizer.lr=1e-3")
    (folder / "shown.yaml").write_text(result.out)
    shown = StackWiseConfig.from_yaml(folder / "shown.yaml")
    assert shown.training.optimizer.lr == 1e-3
    assert shown.model.n_kv_heads == 2
    assert "  n_kv_heads: 2  # the choice of gpt_style\n" in result.out
    assert (
        "    joint_tuning: true  # stacks that grew one by one are trained together at the end\n"
        in result.out
    )
    assert cli("config", "show", folder / "shown.yaml").out.count("#") == 0, "nothing is left to derive"


@pytest.mark.parametrize("name", preset_names())
def test_the_presets_are_valid(name, cli, folder):
    (folder / "input.txt").write_text("text")
    assert cli("config", "validate", name) == (0, f"{name} is valid\n", "")


def test_keys_without_effect_are_pointed_out(cli, folder):
    result = cli(
        "config", "validate", "tiny.yaml", "training.progressive.enabled=false", "training.decay_fraction=.3"
    )
    assert result.code == 0
    assert "note: training.decay_fraction has no effect: training.lr_schedule is not wsd" in result.err


def test_schema_lists_every_key_and_its_help(cli):
    text = cli("config", "schema").out
    for row in schema_rows():
        assert f"{row.key}: {row.type} = {row.default}\n    {row.help}\n    allowed: {row.allowed}\n" in text
    below = cli("config", "schema", "training.optimizer").out
    assert below
    assert all(line.startswith(("training.optimizer.", "    ")) for line in below.splitlines() if line)
    one = json.loads(cli("config", "schema", "model.d_model", "--json").out)
    assert [row["key"] for row in one] == ["model.d_model"]


# plan --------------------------------------------------------------------------------------------------------------


def test_plan_shows_the_stages(cli, folder):
    result = cli("plan", "tiny.yaml")
    assert result.code == 0
    for piece in (
        "1 stack 1",
        "2 stack 2",
        "append 1 (copy)",
        "3 joint",
        "new, tail, norm, head",
        "FLOP",
        "moments",
    ):
        assert piece in result.out
    assert "model.n_kv_heads = 2 (the choice of gpt_style)" in result.out


def test_plan_as_json(cli, folder):
    laid_out = json.loads(cli("plan", "tiny.yaml", "training.progressive.joint_tuning=false", "--json").out)
    assert [stage["steps"] for stage in laid_out["stages"]] == [3, 3]
    assert laid_out["total_flops"] == sum(stage["flops"] for stage in laid_out["stages"])
    assert not (folder / "runs" / "tiny").exists(), "a plan trains nothing"


# train -------------------------------------------------------------------------------------------------------------


def test_train_takes_overrides_and_stores_the_resolved_configuration(cli, folder):
    result = cli("train", "tiny.yaml", "training.optimizer.lr=2e-3", "training.progressive.enabled=false")
    assert result.code == 0
    stored = yaml.safe_load((folder / "runs/tiny/config.yaml").read_text())
    assert stored["training"]["optimizer"]["lr"] == 2e-3
    events = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert max(event["lr"] for event in events if event["event"] == "step") <= 2e-3
    assert [event["stages"][0]["name"] for event in events if event["event"] == "run_start"] == ["end to end"]


def test_train_ends_with_what_to_type_next(cli, folder):
    result = cli("train", "tiny.yaml", "tracking.report=true")
    lines = result.out.splitlines()
    at = lines.index("Run     runs/tiny")
    assert lines[at + 1] == "Report  runs/tiny/report.html"
    assert "  stackwise generate runs/tiny" in result.out
    assert "  stackwise eval runs/tiny" in result.out
    assert (folder / "runs/tiny/report.html").exists()
    assert "step 7/7" in result.out


def test_quiet_prints_the_run_folder_alone(cli, folder):
    assert cli("train", "tiny.yaml", "-q") == (0, "runs/tiny\n", "")


def test_resume_continues_from_the_stored_state(cli, run_folder):
    before = (run_folder / "runs/tiny/store/refs/latest").read_text()
    result = cli("train", "tiny.yaml", "--resume", "checkpoint.overwrite=true", "--plain")
    assert result.code == 0
    assert "resumed after step 7" in result.out
    assert (run_folder / "runs/tiny/store/refs/latest").read_text() == before, "--resume never starts over"


def test_a_deprecated_key_is_told_in_one_line(folder, cli):
    (folder / "old.yaml").write_text("model: {n_blocks: 4, architecture: {blocks_per_stack: 2}}\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli("config", "validate", "old.yaml").code == 0
    assert [str(warning.message) for warning in caught] == [
        "deprecated: model.n_blocks (write model.architecture.n_stacks and blocks_per_stack)"
    ]


# data, tokenizer ---------------------------------------------------------------------------------------------------


def test_data_prepare_counts_and_reuses(cli, folder):
    first = cli("data", "prepare", "tiny.yaml")
    assert first.code == 0
    assert "train       1,620 tokens of 1,620 bytes in 1 document\n" in first.out
    assert "was there already" in cli("data", "prepare", "tiny.yaml").out
    facts = json.loads(cli("data", "prepare", "tiny.yaml", "--json").out)
    assert facts["reused"]
    assert facts["hash"] in first.out


def test_tokenizer_train_writes_a_tokenizer_that_train_takes(cli, folder):
    result = cli("tokenizer", "train", "tiny.yaml", "--vocab-size", "270", "--out", "bpe.json")
    assert result.code == 0
    assert "bpe.json: 270 tokens from 1,620 bytes of 1 document\n" in result.out
    assert load_tokenizer(folder / "bpe.json").vocab_size == 270
    more = cli("tokenizer", "train", "tiny.yaml", "-v", "9999", "-o", "bpe.json", "--force")
    assert "fewer than 9,999" in more.out
    assert cli("plan", "tiny.yaml", "data.tokenizer=bpe.json").code == 0


# runs, report ------------------------------------------------------------------------------------------------------


def test_runs_lists_what_is_there(cli, run_folder):
    assert re.search(r"^ tiny +done +7/7 +2 ", cli("runs").out, re.MULTILINE)
    assert cli("runs").out == cli("runs", "ls", "runs").out
    (listed,) = json.loads(cli("runs", "ls", "--json").out)
    assert (listed["run_id"], listed["status"], listed["step"]) == ("tiny", "done", 7)


def test_runs_without_any(cli, folder):
    result = cli("runs")
    assert result.code == 0
    assert "No runs in runs. `stackwise demo` makes one" in result.out


@pytest.mark.parametrize("name", ["tiny", "runs/tiny"])
def test_runs_show_tells_the_story_of_a_run(name, cli, run_folder):
    text = cli("runs", "show", name).out
    assert "runs/tiny: done" in text
    assert re.search(r"^ 2 stack 2 +2 .+ \d\.\d{4} +\d\.\d{4} +\d\.\d{4} ", text, re.MULTILINE)
    facts = json.loads(cli("runs", "show", name, "--json").out)
    assert facts["growths"][0]["before"]["loss"] > 0


def test_an_unfinished_run_shows_how_to_go_on(cli, run_folder):
    metrics = run_folder / "runs/tiny/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    text = cli("runs", "show", "tiny").out
    assert "unfinished (still training, or ended without a word)" in text
    assert "stackwise train runs/tiny/config.yaml --resume" in text
    assert cli("train", "runs/tiny/config.yaml", "--resume", "-q").code == 0


def test_a_damaged_run_is_listed_with_the_reason(cli, run_folder):
    (run_folder / "runs/tiny/config.yaml").unlink()
    result = cli("runs")
    assert re.search(r"^ tiny +damaged ", result.out, re.MULTILINE)
    assert "note: runs/tiny: config.yaml is missing" in result.err


def test_rm_deletes_the_run_and_nothing_else(cli, run_folder):
    (run_folder / "runs/tiny/mine.txt").write_text("keep me")
    assert cli("runs", "rm", "tiny", "--yes").out == "deleted the run in runs/tiny; other files in it stay\n"
    assert [path.name for path in (run_folder / "runs/tiny").iterdir()] == ["mine.txt"]


def test_rm_asks(cli, run_folder, monkeypatch):
    monkeypatch.setattr("typer.confirm", lambda question: "Delete the run in runs/tiny (" not in question)
    cli("runs", stdin="")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert cli("runs", "rm", "tiny").out == "Nothing was deleted.\n"
    monkeypatch.setattr("typer.confirm", lambda question: True)
    assert cli("runs", "rm", "tiny").out == "deleted runs/tiny\n"
    assert not (run_folder / "runs/tiny").exists()


def test_report_is_built_again(cli, run_folder):
    result = cli("report", "tiny")
    assert result == (0, "runs/tiny/report.html\n", "")
    assert "StackWise" in (run_folder / "runs/tiny/report.html").read_text()


# info --------------------------------------------------------------------------------------------------------------


def test_info_tells_what_a_run_finds_here(cli):
    text = cli("info").out
    for piece in ("torch ", "dtype auto", "native bfloat16", "threads", "memory", "matplotlib", "presets"):
        assert piece in text
    facts = json.loads(cli("info", "--json").out)
    assert facts["compute"]["threads"] >= 1
    assert facts["machine"]["memory_bytes"] > 0


def test_threads_are_set(cli, monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        assert json.loads(cli("info", "--threads", "2", "--json").out)["compute"]["threads"] == 2
    finally:
        torch.set_num_threads(before)
