"""What a run trained on masked tokens is good for: generate, fill and embed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from stackwise.cli import denoise
from stackwise.cli.main import main

BOTH_WAYS = [
    "model.attention_preset=bert_style",
    "training.progressive.training_objective=diffusion",
    "--quiet",
]
TRAINED = {
    "both": ["training.progressive.enabled=false"],
    "deep": ["training.progressive.building_mode=independent", "training.progressive.independent_io=shared"],
}


@pytest.fixture(scope="module")
def trained_masked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a diffusion run, one whose stacks own intervals of noise, and the causal run tiny."""
    folder = tmp_path_factory.mktemp("masked") / "work"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda fd: None)
        for name, words in TRAINED.items():
            assert main(["train", "tiny.yaml", f"training.run_id={name}", *words, *BOTH_WAYS]) == 0
    return folder


@pytest.fixture
def masked(trained_masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained_masked, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_generate_continues_a_prompt_and_tells_what_it_took(cli, masked):
    words = ["generate", "both", "-p", "the ", "-n", "20", "--steps", "5", "--grid", "linear"]
    result = cli(*words, "--seed", "3")
    assert result.code == 0, result.err
    assert result.out.startswith("the ")
    assert len(result.out) == len("the ") + 20 + len("\n")
    assert result.err == "sampler confidence, 5 steps, block the whole length, seed 3, 5 forward passes\n"
    assert cli(*words, "--seed", "3").out == result.out
    assert cli(*words, "--seed", "4").out != result.out


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "threshold", "remask", "unroll", "stream"])
def test_every_sampler_fills_the_gaps_and_nothing_else(cli, masked, sampler):
    result = cli("generate", "deep", "-p", "the [MASK:6] fox[MASK]", "--sampler", sampler)
    assert result.code == 0, result.err
    assert re.fullmatch(r"the (.|\n){6} fox(.|\n)\n", result.out)
    assert result.err.startswith(f"sampler {sampler}, ")
    passes = int(re.search(r"(\d+) forward pass", result.err)[1])
    assert passes == 1 if sampler == "stream" else 1 <= passes <= 64


def test_options_of_the_run_hold_until_they_are_overridden(cli, masked):
    config = masked / "runs/both/config.yaml"
    text = config.read_text()
    assert "sampler: confidence" in text
    config.write_text(
        text.replace("sampler: confidence", "sampler: threshold").replace("threshold: 0.9", "threshold: 1.0")
    )
    words = ["generate", "both", "-p", "a[MASK:9]"]
    assert cli(*words).err == "sampler threshold, 9 steps, block the whole length, seed 0, 9 forward passes\n"
    assert "1 forward pass\n" in cli(*words, "--threshold", "0").err
    blocks = cli(*words, "--sampler", "confidence", "--block-length", "3", "--steps", "6", "--grid", "linear")
    assert blocks.err == "sampler confidence, 6 steps, block 3, seed 0, 6 forward passes\n"


def test_a_continuation_may_outgrow_the_context(cli, masked):
    result = cli("generate", "both", "-p", "the ", "-n", "60", "--steps", "2")
    assert result.code == 0, result.err
    assert len(result.out) == len("the ") + 60 + len("\n")


def test_watch_shows_the_text_appear_line_by_line_in_a_pipe(cli, masked):
    result = cli("generate", "both", "-p", "the [MASK:3] fox", "--watch", "--block-length", "1")
    *steps, took = result.err.splitlines()
    shown = "\n".join(steps)
    assert shown.startswith("step 0: the ░░░ fox\nstep 1: the ")
    assert [part.count("░") for part in re.split(r"step \d: ", shown)[1:]] == [3, 2, 1, 0]
    assert shown.endswith(result.out.rstrip("\n"))
    assert took.endswith("3 forward passes")


def test_watch_draws_over_itself_in_a_terminal(cli, masked, monkeypatch):
    monkeypatch.setattr(denoise, "FRAME", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    result = cli("generate", "both", "-p", "the [MASK:3] fox", "--watch", "--block-length", "1")
    assert result.code == 0, result.err
    assert "░░░" in result.err
    assert "\x1b[2K" in result.err, "each frame erases the one before"
    assert result.out.startswith("the ")


@pytest.mark.parametrize(
    ("objective", "use", "other"),
    [("diffusion", "stackwise generate", "fill"), ("mlm", "stackwise fill", "generate")],
)
def test_a_run_ends_by_telling_what_it_is_good_for(cli, masked, objective, use, other):
    words = ["train", "tiny.yaml", "--plain", "training.progressive.enabled=false", *BOTH_WAYS[:1]]
    told = cli(*words, f"training.progressive.training_objective={objective}", "training.run_id=new").out
    steps = told[told.index("\nNext\n") :]
    assert use in steps
    assert other not in steps
    assert "stackwise eval" in steps


def test_fill_ranks_tokens_for_every_gap(cli, masked):
    facts = json.loads(cli("fill", "both", "the [MASK]uick[MASK:2]", "--top", "4", "--json").out)
    assert facts["text"] == "the [MASK]uick[MASK:2]"
    assert [len(gap) for gap in facts["gaps"]] == [4, 4, 4]
    for gap in facts["gaps"]:
        chances = [candidate["probability"] for candidate in gap]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) < 1
    everything = json.loads(cli("fill", "both", "th[MASK]", "--top", "999", "--json").out)["gaps"][0]
    assert math.isclose(sum(c["probability"] for c in everything), 1, rel_tol=1e-9)
    assert len({c["token"] for c in everything}) == len(everything)
    assert all(len(c["token"]) == 1 for c in everything), "the mask token is no candidate"
    table = cli("fill", "both", "the [MASK]uick[MASK:2]")
    assert "gap 3 of 3" in table.out
    assert repr(facts["gaps"][0][0]["token"]) in table.out


def test_embed_gives_a_vector_per_text(cli, masked):
    lines = cli("embed", "both", "the fox", "the dog", "the fox").out.splitlines()
    facts = [json.loads(line) for line in lines]
    assert [fact["text"] for fact in facts] == ["the fox", "the dog", "the fox"]
    assert [len(fact["embedding"]) for fact in facts] == [16, 16, 16]
    assert facts[0]["embedding"] == pytest.approx(facts[2]["embedding"], rel=1e-5)
    alone = json.loads(cli("embed", "both", "the dog").out)["embedding"]
    assert facts[1]["embedding"] == pytest.approx(alone, rel=1e-4, abs=1e-6)
    table = cli("embed", "both", "the fox", "the dog", "the fox", "--similarity").out
    rows = [line.split()[-3:] for line in table.splitlines() if "'the" in line]
    assert [row[i] for i, row in enumerate(rows)] == ["1.000"] * 3
    assert rows[0][2] == "1.000"
    assert rows[0][1] == rows[1][0] != "1.000"


WRONG = [
    (
        ["generate", "tiny", "--sampler", "remask", "--steps", "3", "--watch"],
        "--sampler, --steps, --watch cannot",
    ),
    (["generate", "both", "--repetition-penalty", "2"], "--repetition-penalty cannot be used here"),
    (
        ["generate", "both", "-p", "a[MASK]", "-n", "3"],
        "--max-new-tokens cannot be used here: the text has gaps",
    ),
    (["generate", "both", "--sampler", "remsk", "--steps", "0"], "2 problems"),
    (["generate", "both", "--sampler", "unroll"], "no stack of this rack owns an interval"),
    (
        ["generate", "deep", "--sampler", "unroll", "--block-length", "2"],
        "block_length cannot be set for unroll",
    ),
    (["generate", "both", "-p", "a[MASK:40]"], "the text has 41 tokens, more than max_seq_len = 32"),
    (["generate", "both", "-p", "a[MASK:0]"], "the gap [MASK:0] is empty"),
    (["fill", "both", "no gap"], "write [MASK] where a token is missing"),
    (["fill", "both", "Ω[MASK]"], "U+03A9"),
    (["fill", "tiny", "a[MASK]"], "`stackwise generate` continues a text with it"),
    (["embed", "tiny", "a"], "`stackwise embed` needs a model that sees both directions"),
    (["chat", "both"], "that of this run sees both directions; `stackwise generate` fills masked positions"),
    (["embed", "both", ""], "the text '' has no tokens"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_what_cannot_be_done_is_told_in_one_line(cli, masked, words, message):
    result = cli(*words)
    assert result.code == 2, result.err
    assert message in result.err
    assert "not foreseen" not in result.err
    assert result.out == ""
