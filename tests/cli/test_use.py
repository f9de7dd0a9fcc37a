"""What a run is good for: generate, chat and eval."""

from __future__ import annotations

import json

import pytest


def test_generate_prints_the_prompt_and_what_follows(cli, run_folder):
    result = cli("generate", "tiny", "--prompt", "the ", "--max-new-tokens", "20")
    assert result.code == 0, result.err
    assert result.out.startswith("the ")
    assert len(result.out) == len("the ") + 20 + len("\n")
    assert result.err == ""


def test_the_same_seed_gives_the_same_text_and_another_another(cli, run_folder):
    words = ["generate", "tiny", "-p", "the ", "-n", "30"]
    assert cli(*words, "--seed", "1").out == cli(*words, "--seed", "1").out
    assert cli(*words, "--seed", "1").out != cli(*words, "--seed", "2").out


def test_greedy_is_temperature_zero_whatever_the_seed(cli, run_folder):
    words = ["generate", "tiny", "-p", "the ", "-n", "30"]
    assert cli(*words, "--greedy", "--seed", "1").out == cli(*words, "--temperature", "0").out
    refused = cli(*words, "--greedy", "--temperature", "1")
    assert refused.code == 2
    assert "leave one of the two out" in refused.err


def test_a_stop_text_ends_the_continuation_before_itself(cli, run_folder):
    words = ["generate", "tiny", "-p", "the ", "-n", "30", "--greedy"]
    full = cli(*words).out.removeprefix("the ")
    stopped = cli(*words, "--stop", full[3], "--stop", "no such text").out
    assert stopped == "the " + full[: full.index(full[3])] + "\n"


def test_the_prompt_comes_from_a_pipe_or_from_the_run(cli, run_folder):
    given = cli("generate", "tiny", "--prompt", "the ", "--greedy").out
    assert cli("generate", "tiny", "--prompt", "-", "--greedy", stdin="the ").out == given
    config = run_folder / "runs/tiny/config.yaml"
    config.write_text(config.read_text().replace("sample_prompt: ''", "sample_prompt: 'the '"))
    assert cli("generate", "tiny", "--greedy").out == given


def test_options_of_the_run_hold_until_they_are_overridden(cli, run_folder):
    assert len(cli("generate", "tiny", "-p", "the ").out) == len("the ") + 4 + 1, (
        "max_new_tokens of tiny.yaml"
    )


def test_all_wrong_options_are_told_at_once(cli, run_folder):
    result = cli("generate", "tiny", "--top-k", "-1", "--seed", "-1", "--stop", "")
    assert result.code == 2
    assert "3 problems" in result.err
    assert all(option in result.err for option in ("--top-k", "--seed", "--stop"))


def test_chat_answers_line_after_line(cli, run_folder):
    result = cli("chat", "tiny", "--max-new-tokens", "6", stdin="the \nquick\n")
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) >= 2
    assert cli("chat", "tiny", "--max-new-tokens", "6", stdin="the \nquick\n").out == result.out


def test_chat_survives_a_line_the_model_cannot_spell(cli, run_folder):
    result = cli("chat", "tiny", stdin="Ω\nthe \n")
    assert result.code == 0
    assert "U+03A9" in result.out


def test_eval_measures_the_held_out_text_whatever_the_batch(cli, run_folder):
    facts = [json.loads(cli("eval", "tiny", "--batch-size", size, "--json").out) for size in ("1", "7")]
    assert facts[0]["nats_per_token"] == pytest.approx(facts[1]["nats_per_token"], rel=1e-6)
    assert facts[0]["label"] == "exact"
    text = cli("eval", "tiny").out
    assert f"{facts[0]['perplexity']:.3f}" in text
    assert "nats per token (exact)" in text
    assert "bits per byte" in text
    assert cli("eval", "tiny").out == text


def test_eval_agrees_with_the_last_evaluation_of_the_training(cli, folder):
    assert cli("train", "tiny.yaml", "evaluation.batches=null", "-q").code == 0
    events = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    final = next(event for event in events if event.get("when") == "final")
    facts = json.loads(cli("eval", "tiny", "--json").out)
    assert facts["nats_per_token"] == pytest.approx(final["loss"], rel=1e-6)
    assert facts["bits_per_byte"] == pytest.approx(final["bits_per_byte"], rel=1e-6)


def test_eval_says_that_the_text_has_changed(cli, run_folder):
    text = run_folder / "text.txt"
    text.write_text(text.read_text() * 2)
    result = cli("eval", "tiny")
    assert result.code == 0
    assert "note: the text has changed since the run was trained" in result.err
    text.write_text("ΑΒΓ" * 500)
    refused = cli("eval", "tiny")
    assert refused.code == 2
    assert "put the text back as it was" in refused.err


def test_eval_needs_no_tokenizer_file_but_the_runs_own(cli, folder):
    assert cli("tokenizer", "train", "tiny.yaml", "--vocab-size", "270", "--out", "bpe.json").code == 0
    assert cli("train", "tiny.yaml", "data.tokenizer=bpe.json", "-q").code == 0
    (folder / "bpe.json").unlink()
    assert cli("eval", "tiny").code == 0
    assert cli("generate", "tiny", "-p", "the ").code == 0
