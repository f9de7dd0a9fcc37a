"""`stackwise profile` from the command line."""

from __future__ import annotations

import json

import pytest


def test_figures_are_printed_and_files_written(folder, cli):
    result = cli("profile", "tiny.yaml", "--stage", 2, "--steps", 1)
    assert result.code == 0
    assert "tiny, stage 2 of 3 (stack 2), cpu float32" in result.out
    for heading in ("Memory", "Time by part of a step", "Operators by time of their own"):
        assert heading in result.out
    assert "Page    profiles/tiny-stage-2/profile.html" in result.out
    assert (folder / "profiles/tiny-stage-2/trace.json.gz").stat().st_size > 1000
    assert not (folder / "runs/tiny").exists()


def test_json_holds_the_figures_and_where_the_page_is(folder, cli):
    result = cli("profile", "tiny.yaml", "training.batch_size=3", "--steps", 1, "--out", "here", "--json")
    assert result.code == 0
    told = json.loads(result.out)
    assert (told["run_id"], told["name"], told["tokens"], told["page"]) == (
        "tiny",
        "joint",
        48,
        "here/profile.html",
    )
    assert told["measured"]["parameters"] == told["planned"]["parameters"]
    assert result.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "0"], "--stage counts from 1, got 0"),
        (
            ["--stage", "9"],
            "--stage: the run has no such stage, got 9; allowed: 1 stack 1, 2 stack 2, 3 joint",
        ),
        (["--steps", "0"], "greater than or equal to 1"),
        (["--out", "text.txt"], "--out must be a folder, text.txt is a file"),
        (["training.batch_sise=3"], "did you mean 'training.batch_size'?"),
    ],
)
def test_wrong_words_are_explained(folder, cli, words, message):
    result = cli("profile", "tiny.yaml", *words)
    assert result.code == 2
    assert message in result.err
    assert not (folder / "profiles").exists()
