"""`stackwise eval RUN --text ...`: any text, overlapping windows, and results that are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stackwise.cli import evaluate_text
from stackwise.cli.evaluate_text import own_corpus
from stackwise.evaluation.perplexity import Perplexity
from stackwise.training.stored import open_run


@pytest.fixture
def other(run_folder: Path) -> Path:
    text = (run_folder / "text.txt").read_text()
    (run_folder / "other.txt").write_text(text[7:200])
    (run_folder / "rows.jsonl").write_text(
        "".join(json.dumps({"body": text[i : i + 30]}) + "\n" for i in range(0, 90, 30))
    )
    return run_folder


def test_any_text_is_measured_to_its_end(cli, other):
    facts = json.loads(cli("eval", "tiny", "--text", "other.txt", "--json").out)
    assert facts["data"]["bytes"] == 193
    assert facts["tokens"] == facts["data"]["tokens"] - 1
    assert facts["protocol"]["stride"] == facts["protocol"]["seq_len"]
    rows = json.loads(cli("eval", "tiny", "--text", "rows.jsonl", "--text-key", "body", "--json").out)
    assert (rows["data"]["documents"], rows["data"]["bytes"]) == (3, 90)
    assert "on 193 bytes of other.txt" in cli("eval", "tiny", "--text", "other.txt").out


def test_a_smaller_stride_scores_the_same_tokens_in_more_windows(cli, other):
    words = ("eval", "tiny", "--text", "other.txt", "--json")
    one, two = (json.loads(cli(*words, "--stride", stride).out) for stride in ("8", "16"))
    assert one["tokens"] == two["tokens"]
    assert one["windows"] > two["windows"]
    assert one["nats_per_token"] != two["nats_per_token"]
    assert "one every 8" in cli("eval", "tiny", "--stride", "8").out


def test_results_are_kept_with_all_that_they_depend_on(cli, other):
    run = ("eval", "tiny", "--out", "kept")
    for words in ((), ("--stride", "4"), ("--text", "other.txt"), ("--seq-len", "8"), ()):
        assert cli(*run, *words).code == 0
    kept = [json.loads(path.read_text()) for path in sorted((other / "kept").iterdir())]
    assert len(kept) == 4
    for facts in kept:
        assert len(facts["tokenizer"]) == len(facts["data"]["hash"]) == 64
        assert {"stackwise", "torch", "python"} <= set(facts["versions"])
        assert facts["protocol"]["likelihood"] == facts["label"] == "exact"
    assert len({facts["data"]["hash"] for facts in kept}) == 2


def test_what_does_not_fit_is_refused(cli, other):
    (other / "tiny.txt").write_text("t")
    for words, message in (
        (["--text", "absent.txt"], "--text: there is no file"),
        (["--text", "other.txt", "--text-key", "body", "--stride", "17"], "--stride 17 would leave out"),
        (["--text-key", "body"], "--text-key goes with --text"),
        (["--text", "other.txt", "--text-key", "body"], "--text-key body: a text file has no fields"),
        (
            ["--text", "tiny.txt"],
            "the text split has 1 tokens and a row needs 2 (context and next token); give a longer",
        ),
        (["--out", "other.txt"], "other.txt: Not a directory"),
        (["--seq-len", "1000"], "longer than the model's max_seq_len"),
        (["--tasks", "x.jsonl", "--stride", "2", "--seq-len", "4"], "--seq-len, --stride is not for --tasks"),
        (["--limit", "2", "--shots", "1"], "--limit, --shots goes with --tasks"),
    ):
        refused = cli("eval", "tiny", *words)
        assert refused.code == 2, words
        assert message in refused.err


def test_what_is_no_number_is_null_in_json(cli, other, monkeypatch):
    found = Perplexity(800.0, math.inf, None, tokens=1, windows=1, seq_len=2)
    monkeypatch.setattr(evaluate_text, "perplexity", lambda *args, **options: found)
    done = cli("eval", "tiny", "--out", "endless", "--json")
    (path,) = (other / "endless").iterdir()
    for text in (done.out, path.read_text()):
        facts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert (facts["nats_per_token"], facts["perplexity"]) == (800.0, None)


def test_a_model_without_a_text_of_its_own_says_what_is_read(run_folder, capsys):
    opened = open_run("runs/tiny")
    for corpus, said in (
        ("", "was imported"),
        ("0" * 64, "the text has changed"),
        (opened.meta["corpus"], ""),
    ):
        opened.meta["corpus"] = corpus
        own_corpus(opened)
        told = capsys.readouterr().err
        assert (said in told, bool(told)) == (True, bool(said))
