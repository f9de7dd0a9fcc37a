"""`stackwise eval RUN --tasks ...` on causal, masked and diffusion runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from stackwise.cli import evaluate_tasks
from stackwise.cli.main import main

PAIRS = [
    {"sentence_good": f"the {animal} jumps over", "sentence_bad": f"the {animal} dog dog"}
    for animal in ("fox", "quick fox", "brown dog", "lazy fox")
]
QUIZ = [{"prompt": "the quick brown", "choices": ["fox", "lazy"], "answer": n % 2} for n in range(5)]
ASK = [{"prompt": "the quick brown", "answer": "fox", "max_new_tokens": 5}]


def put(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture(scope="module")
def trained_kinds(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "work"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda fd: None)
        for name, words in {
            "encoder": ["training.progressive.training_objective=mlm"],
            "diffused": ["training.progressive.training_objective=diffusion"],
            "noisy": ["training.progressive.training_objective=diffusion", "objective.corruption=gaussian"],
        }.items():
            words = [*words, "training.progressive.enabled=false", "model.attention_preset=bert_style"]
            assert main(["train", "tiny.yaml", f"training.run_id={name}", *words, "--quiet"]) == 0
        for name, rows in (("pairs", PAIRS), ("quiz", QUIZ), ("ask", ASK)):
            put(f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def work(trained_kinds: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained_kinds)
    return trained_kinds


@pytest.mark.parametrize(("run", "label"), [("tiny", "exact"), ("encoder", "pseudo"), ("diffused", "bound")])
def test_all_kinds_of_runs_score_all_kinds_of_tasks(cli, work, run, label):
    words = ("eval", run, "--tasks", "pairs.jsonl,quiz.jsonl,ask.jsonl")
    done = cli(*words, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["protocol"]["likelihood"] == facts["tasks"]["pairs"]["label"] == label
    assert facts["protocol"]["mc_samples"] == (16 if label == "bound" else None)
    assert [task["n"] for task in facts["tasks"].values()] == [4, 5, 1]
    assert set(facts["tasks"]["ask"]["metrics"]) == {"exact_match", "contains"}
    again = json.loads(cli(*words, "--json", "--batch-size", "1").out)
    assert again["tasks"] == facts["tasks"]
    table = cli(*words).out
    assert f"likelihoods: {label}" in table
    assert f"{facts['tasks']['quiz']['metrics']['acc']['value']:.4f} ± " in table


def test_the_figures_are_kept_with_all_that_they_depend_on(cli, work, tmp_path):
    run = ("eval", "tiny", "--tasks", "quiz.jsonl", "--out", tmp_path / "new" / "results")
    for words in ((), ("--shots", "2"), ("--limit", "3"), ()):
        assert cli(*run, *words).code == 0
    kept = sorted((tmp_path / "new" / "results").iterdir())
    assert len(kept) == 3  # the same question again replaces its file
    found = [json.loads(path.read_text()) for path in kept]
    assert {facts["tasks"]["quiz"]["shots"] for facts in found} == {0, 2}
    assert {facts["tasks"]["quiz"]["n"] for facts in found} == {3, 5}
    for path, facts in zip(kept, found, strict=True):
        assert path.name.startswith(f"tiny-{facts['commit']}-")
        assert facts["commit_sha256"].startswith(facts["commit"].partition("-")[2])
        assert len(facts["tokenizer"]) == len(facts["tasks"]["quiz"]["task_hash"]) == 64
        assert {"stackwise", "torch", "python"} <= set(facts["versions"])


def test_pairs_that_were_learned_are_found_and_shuffled_labels_stay_at_chance(cli, folder):
    learn = ("training.run_id=learned", "training.max_steps=60", "training.progressive.enabled=false")
    assert cli("train", "tiny.yaml", *learn, "training.optimizer.lr=0.02", "--quiet").code == 0
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    draw = random.Random(0)
    rows, shuffled = [], []
    for _ in range(150):
        start, count = draw.randrange(5), draw.randint(3, 5)
        good = words[start : start + count]
        bad = good[::-1]
        pair = (" ".join(good), " ".join(bad))
        rows.append(dict(zip(("sentence_good", "sentence_bad"), pair, strict=True)))
        shuffled.append(dict(zip(("sentence_good", "sentence_bad"), draw.sample(pair, 2), strict=True)))
    done = cli(
        "eval", "learned", "--tasks", f"{put('toy.jsonl', rows)},{put('shuffled.jsonl', shuffled)}", "--json"
    )
    toy, chance = (json.loads(done.out)["tasks"][name] for name in ("toy", "shuffled"))
    assert (toy["n"], toy["chance"]) == (150, 0.5)
    assert toy["metrics"]["acc"]["value"] > 0.9
    assert abs(chance["metrics"]["acc"]["value"] - 0.5) < 3 * chance["metrics"]["acc"]["standard_error"]


def test_more_draws_of_masks_can_be_asked_of_a_bound_alone(cli, work):
    facts = json.loads(cli("eval", "diffused", "--tasks", "quiz.jsonl", "--mc-samples", "3", "--json").out)
    assert facts["protocol"]["mc_samples"] == 3
    refused = cli("eval", "encoder", "--tasks", "quiz.jsonl", "--mc-samples", "3")
    assert (refused.code, "that of this run is pseudo" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "2"], "--limit goes with --tasks"),
        (["--shots", "2", "--limit", "3"], "--limit, --shots goes with --tasks"),
        (["--tasks", "quiz.jsonl", "--by-time"], "--by-time is not for --tasks"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "absent.jsonl"], "no task file absent.jsonl"),
        (
            ["--tasks", "quiz.jsonl", "--batch-size", "0"],
            "'--batch-size': Input should be greater than or equal to 1",
        ),
        (["--tasks", "pairs.jsonl", "--shots", "1"], "minimal pairs have no prompt"),
        (["--tasks", "quiz.jsonl,quiz.jsonl"], "--tasks names quiz.jsonl twice"),
        (["--tasks", "quiz.jsonl,./quiz.jsonl"], "two task files are called quiz"),
        (["--tasks", "quizz.jsonl"], "did you mean 'quiz.jsonl'"),
        (["--tasks", "./elsewhere.jsonl"], "task files there: ask.jsonl, pairs.jsonl, quiz.jsonl"),
        (["--tasks", "runs/"], "runs/ is a folder"),
        (["--tasks", "quiz.jsonl", "--out", "quiz.jsonl"], "quiz.jsonl: Not a directory"),
    ],
)
def test_what_does_not_fit_is_refused(cli, work, words, message):
    refused = cli("eval", "tiny", *words)
    assert refused.code == 2
    assert message in refused.err


def test_a_name_needs_lm_eval_and_says_how_to_get_it(cli, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = cli("eval", "tiny", "--tasks", "hellaswag")
    assert refused.code == 2
    assert "pip install 'stackwise[eval]'" in refused.err


def test_ctrl_c_keeps_the_tasks_that_are_finished(cli, work, tmp_path, monkeypatch):
    real = evaluate_tasks.run_task

    def stops(task, *args, **options):
        if task.name == "quiz":
            raise KeyboardInterrupt
        return real(task, *args, **options)

    monkeypatch.setattr(evaluate_tasks, "run_task", stops)
    words = ("eval", "tiny", "--tasks", "pairs.jsonl,quiz.jsonl", "--out", tmp_path)
    done = cli(*words)
    assert done.code == 130
    assert "1 of 2 tasks are finished" in done.err
    assert "pairs" in done.out
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["tasks"]) == ["pairs"]
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert cli(*words).code == 0
    assert [path.name for path in tmp_path.glob("*.json")] == [path.name]  # the same question
    assert list(json.loads(path.read_text())["tasks"]) == ["pairs", "quiz"]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_scored(cli, work, monkeypatch):
    monkeypatch.setattr(evaluate_tasks, "run_task", lambda *args, **options: pytest.fail("it was scored"))
    monkeypatch.setattr(
        "stackwise.evaluation.record.os.access", lambda path, mode: Path(path).name != "closed"
    )
    refused = cli("eval", "tiny", "--tasks", "pairs.jsonl", "--out", "closed")
    assert (refused.code, "Permission denied" in refused.err) == (2, True)


def test_how_masked_positions_are_filled_is_part_of_the_protocol(cli, work):
    facts = json.loads(cli("eval", "diffused", "--tasks", "ask.jsonl", "--json").out)
    assert facts["protocol"]["generation"]["sampler"] == "confidence"
    assert facts["protocol"]["generation"]["greedy"] is True
    facts = json.loads(cli("eval", "tiny", "--tasks", "ask.jsonl", "--json").out)
    assert facts["protocol"]["generation"] == "greedy"


def test_noise_on_embeddings_cannot_say_how_likely_a_text_is(cli, work):
    refused = cli("eval", "noisy", "--tasks", "pairs.jsonl")
    assert (refused.code, "gaussian corruption hides no token" in refused.err) == (2, True)


def test_a_character_that_the_tokenizer_lacks_names_the_row(cli, work, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"sentence_good": "the fox", "sentence_bad": "THE fox"}) + "\n")
    refused = cli("eval", "tiny", "--tasks", path)
    assert (refused.code, "odd.jsonl:1: the character 'T'" in refused.err) == (2, True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_task_in_the_yaml_of_lm_eval_agrees_with_the_file_of_its_rows(cli, work):
    pytest.importorskip("lm_eval")
    Path("described.yaml").write_text(
        "task: described\ndataset_path: json\noutput_type: multiple_choice\nvalidation_split: validation\n"
        f"dataset_kwargs:\n  data_files: {{validation: {Path('quiz.jsonl').resolve()}}}\n"
        f"  cache_dir: {Path('cache').resolve()}\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\nnum_fewshot: 0\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    done = cli("eval", "tiny", "--tasks", "quiz.jsonl,described.yaml", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    own, named = facts["tasks"]["quiz"]["metrics"]["acc"], facts["lm_eval"]["described"]
    assert named["metrics"]["acc"] == own["value"]
    assert len(facts["lm_eval_files"]["described.yaml"]) == 64
    assert named["standard_errors"]["acc"] == pytest.approx(own["standard_error"])
    Path("code.yaml").write_text("task: !function x.y\n")
    Path("nameless.yaml").write_text("dataset_path: json\n")
    for file, message in (
        ("code.yaml", "code.yaml"),
        ("nameless.yaml", "the key task"),
        ("no.yaml", "no task file"),
    ):
        refused = cli("eval", "tiny", "--tasks", file)
        assert (refused.code, message in refused.err) == (2, True), refused.err
