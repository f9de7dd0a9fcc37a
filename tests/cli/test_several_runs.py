"""`runs compare`, and `report` of several runs."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture
def two(cli, folder, monkeypatch):
    monkeypatch.setattr("stackwise.tracking.group_report.group_plots", lambda groups: [])
    for name, width in (("a", 16), ("b", 8)):
        result = cli("train", "tiny.yaml", f"training.run_id={name}", f"model.d_model={width}", "-q")
        assert result.code == 0, result.err
    return folder / "runs"


def test_runs_compare_prints_figures_and_what_differs(cli, two):
    result = cli("runs", "compare", "a", "runs/b")
    assert result.code == 0, result.err
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line.strip()}
    assert rows["model.d_model"] == ["model.d_model", "16", "8"]
    assert "training.run_id" not in rows
    assert rows["a"][1] == "1"
    assert "settings of these runs are the same" not in result.out
    data = json.loads(cli("runs", "compare", "a", "b", "--json").out)
    assert data["differences"]["model.d_model"] == [16, 8]
    assert data["warnings"] == []
    for name, run in zip("ab", data["runs"], strict=True):
        events = [json.loads(line) for line in (two / name / "metrics.jsonl").read_text().splitlines()]
        last = [event for event in events if event["event"] == "eval"][-1]
        assert run["label"] == name
        assert run["loss"]["mean"] == last["loss"]
        assert run["flops"]["mean"] == events[-1]["flops"]


def test_equal_settings_are_said_to_be_equal(cli, two):
    shutil.copytree(two / "a", two / "again")
    assert "The settings of these runs are the same." in cli("runs", "compare", "a", "again").out


def test_report_of_several_runs_is_one_page(cli, two):
    result = cli("report", "a", "b")
    assert (result.code, result.out) == (0, "runs/comparison.html\n")
    assert "<th>model.d_model</th><td>16</td><td>8</td>" in (two / "comparison.html").read_text()
    assert cli("report", "a", "b", "--out", "there.html").out == "there.html\n"
    assert (two.parent / "there.html").read_text() == (two / "comparison.html").read_text()


def test_the_page_of_one_run_can_go_elsewhere(cli, two):
    assert cli("report", "a").code == 0
    page = (two / "a" / "report.html").read_bytes()
    (two / "a" / "report.html").unlink()
    shutil.rmtree(two / "a" / "plots")
    assert cli("report", "a", "--out", "there.html").out == "there.html\n"
    assert (two.parent / "there.html").read_bytes() == page
    assert not (two / "a" / "report.html").exists()
    assert not (two / "a" / "plots").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs", "compare", "a"), "give two runs or more"),
        (("runs", "compare", "a", "runs/a"), "runs/a is named twice"),
        (("runs", "compare", "a", "c"), "there is no run 'c' here or in ./runs"),
        (("report", "a", "a"), "runs/a is named twice"),
        (("report", "a", "--out", "runs"), "--out must be a file, runs is a folder"),
        (("report", "a", "text.txt"), "text.txt is not a folder"),
    ],
)
def test_wrong_runs_are_named(cli, two, words, message):
    result = cli(*words)
    assert result.code == 2
    assert message in result.err


def test_removing_one_run_leaves_the_others_and_the_page(cli, two):
    assert cli("report", "a", "b").code == 0
    (two / "a" / "mine.txt").write_text("kept")
    assert cli("runs", "rm", "a", "--yes").out == "deleted the run in runs/a; other files in it stay\n"
    assert [path.name for path in (two / "a").iterdir()] == ["mine.txt"]
    assert cli("runs", "rm", "b", "--yes").out == "deleted runs/b\n"
    assert sorted(path.name for path in two.iterdir()) == [".data", "a", "comparison.html"]
