"""`stackwise nlu` on causal, masked and diffusion runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from stackwise.cli import nlu_runs
from stackwise.cli.main import main

ANIMALS, OTHERS = ("fox", "dog", "lazy dog", "brown fox"), ("jumps", "over", "quick", "the quick")


def put(folder: Path, rows: list[dict], dev: list[dict] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows), ("dev", rows if dev is None else dev)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def kinds_of_tasks() -> dict[str, list[dict]]:
    words = [(word, 1) for word in ANIMALS] + [(word, 0) for word in OTHERS]
    return {
        "animals": [{"sentence": f"the {word}", "label": label} for word, label in words] * 3,
        "same": [
            {"sentence1": a, "sentence2": b, "label": "yes" if a == b else "no"}
            for a in ANIMALS
            for b in ANIMALS
        ],
        "length": [{"sentence": word, "score": len(word)} for word, _ in words] * 2,
        "tags": [{"tokens": ["the", word], "tags": ["O", "X" if label else "Y"]} for word, label in words],
    }


@pytest.fixture(scope="module")
def trained_kinds(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nlu") / "work"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda fd: None)
        for name, words in {
            "encoder": ["training.progressive.training_objective=mlm"],
            "diffused": ["training.progressive.training_objective=diffusion"],
            "told": [
                "training.progressive.training_objective=diffusion",
                "training.progressive.time_interpretation=input",
            ],
        }.items():
            words = [*words, "training.progressive.enabled=false", "model.attention_preset=bert_style"]
            assert main(["train", "tiny.yaml", f"training.run_id={name}", *words, "--quiet"]) == 0
        words = ["training.progressive.training_objective=diffusion", "model.attention_preset=bert_style"]
        words += ["training.progressive.building_mode=prepend"]
        assert main(["train", "tiny.yaml", "training.run_id=deep", *words, "--quiet"]) == 0
        for name, rows in kinds_of_tasks().items():
            put(folder / "data" / name, rows)
    return folder


@pytest.fixture
def work(trained_kinds: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained_kinds)
    return trained_kinds


@pytest.mark.parametrize("run", ["tiny", "encoder", "diffused", "told", "deep"])
def test_every_kind_of_run_learns_every_kind_of_task(cli, work, run):
    words = ("nlu", run, "--tasks", "animals,same,length,tags", "--data", "data")
    words += ("--seeds", "1", "--epochs", "1")
    done = cli(*words, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    found = facts["tasks"]
    assert list(found) == ["animals", "same", "length", "tags"]
    assert [task["kind"] for task in found.values()] == ["classes", "classes", "number", "tags"]
    assert found["same"]["labels"] == ["no", "yes"]
    for task in found.values():
        assert len(task["by_seed"]) == 1
        assert task["metric"] in task["majority"]
        assert task["metric"] in task["bag_of_words"]
    assert found["animals"]["bag_of_words"]["accuracy"] == 1.0
    assert found["animals"]["majority"]["accuracy"] == 0.5


def test_the_same_call_gives_the_same_figures_and_a_table(cli, work):
    words = ("nlu", "tiny", "--tasks", "animals,same", "--data", "data", "--seeds", "2")
    first, second = (json.loads(cli(*words, "--json").out) for _ in range(2))
    assert first == second
    table = cli(*words)
    mean = first["tasks"]["same"]["summary"]["accuracy"]["mean"]
    assert f"{mean:.4f}" in table.out
    assert "bag of words" in table.out
    assert "seed 2 of 2" in table.err


@pytest.mark.parametrize("method", ["lora", "probe"])
def test_methods_leave_the_run_alone(cli, work, method):
    if method == "lora":
        pytest.importorskip("peft")
    before = {p: p.read_bytes() for p in Path("runs/tiny").rglob("*") if p.is_file()}
    done = cli("nlu", "tiny", "--tasks", "animals", "--data", "data", "--method", method, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert len(facts["tasks"]["animals"]["seeds"]) == (1 if method == "probe" else 3)
    assert before == {p: p.read_bytes() for p in Path("runs/tiny").rglob("*") if p.is_file()}


def test_pairs_can_be_read_in_one_row(cli, work):
    words = ("nlu", "encoder", "--tasks", "same", "--data", "data", "--seeds", "1", "--json")
    twin, joint = (json.loads(cli(*words, "--pair", form).out)["tasks"]["same"] for form in ("twin", "joint"))
    assert (twin["recipe"]["pair"], joint["recipe"]["pair"]) == ("twin", "joint")


def test_the_figures_are_kept_with_all_that_they_depend_on(cli, work, tmp_path):
    words = ("nlu", "tiny", "--tasks", "animals", "--data", "data", "--seeds", "1", "--out", tmp_path / "new")
    for more in ((), ("--epochs", "2"), ("--split", "holdout"), ()):
        done = cli(*words, *more)
        assert done.code == 0, done.err
    kept = sorted((tmp_path / "new").iterdir())
    assert len(kept) == 3  # the same question again replaces its file
    for path in kept:
        facts = json.loads(path.read_text())
        assert facts["commit"] in path.name
        assert len(facts["tokenizer"]) == len(facts["tasks"]["animals"]["files"]["train.jsonl"]) == 64
        assert {"stackwise", "torch", "python", "scikit-learn", "scipy"} <= set(facts["versions"])
        assert facts["tasks"]["animals"]["recipe"]["epochs"] in (2, 5)


def test_ctrl_c_keeps_the_tasks_that_are_finished(cli, work, tmp_path, monkeypatch):
    real = nlu_runs.run_task

    def stops(task, *args, **options):
        if task.name == "same":
            raise KeyboardInterrupt
        return real(task, *args, **options)

    monkeypatch.setattr(nlu_runs, "run_task", stops)
    words = ("nlu", "tiny", "--tasks", "animals,same", "--data", "data", "--seeds", "1", "--out", tmp_path)
    done = cli(*words)
    assert done.code == 130
    assert "1 of 2 tasks are finished" in done.err
    assert "animals" in done.out
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["tasks"]) == ["animals"]


ROW = {"sentence": "the fox", "label": 1}
OTHER = {"sentence": "the dog", "label": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "animals,animals"], "two tasks are called animals"),
        (["--tasks", "animls"], "did you mean 'animals'"),
        (["--tasks", "animals", "--method", "prob"], "did you mean 'probe'"),
        (["--tasks", "animals", "--split", "deu"], "did you mean 'dev'"),
        (["--tasks", "same", "--pair", "twins"], "did you mean 'twin'"),
        (["--tasks", "animals", "--split", "test"], "has no test.jsonl"),
        (["--tasks", "animals", "--lr", "0"], "--lr must be a number above 0"),
        (["--tasks", "animals", "--lr", "1", "--method", "probe"], "--lr has no meaning for --method probe"),
        (
            ["--tasks", "animals", "--epochs", "1", "--seeds", "3", "--method", "probe"],
            "--epochs, --seeds has no meaning for --method probe",
        ),
        (["--tasks", "animals", "--out", "text.txt"], "text.txt: Not a directory"),
    ],
)
def test_what_does_not_fit_is_refused(cli, work, words, message):
    refused = cli("nlu", "tiny", "--data", "data", *words)
    assert (refused.code, message in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("rows", "dev", "message"),
    [
        ([], None, "train.jsonl: holds no rows"),
        ([ROW, OTHER, {"sentence": "x"}], None, "train.jsonl:3: has the keys sentence; a row has"),
        ([ROW, OTHER, {"sentenc": "x", "label": 1}], None, "did you mean 'sentence'"),
        ([ROW, {"sentence": " ", "label": 1}], None, "train.jsonl:2: sentence must be text"),
        ([ROW, {"sentence": "a", "label": 1.5}], None, "label must be a whole number or a text, got 1.5"),
        ([ROW, {"sentence": "a", "score": 1}], None, "but those before it have sentence and label"),
        ([ROW, ROW], None, "all rows have the label '1'"),
        ([ROW, OTHER], [{**ROW, "label": 7}], "the label '7' does not occur in training; labels there: 0, 1"),
        ([{"sentence": "a", "score": float("nan")}], None, "score must be a finite number"),
        ([{"tokens": ["a"], "tags": []}], None, "tags must be a list that is not empty"),
        ([{"tokens": ["a"], "tags": ["O", "X"]}], None, "1 tokens have 2 tags"),
        ([ROW, OTHER, {"sentence": "THE", "label": 1}], None, "the character 'T'"),
    ],
)
def test_rows_that_are_none_are_named(cli, work, tmp_path, rows, dev, message):
    put(tmp_path / "odd", rows, dev)
    refused = cli("nlu", "tiny", "--tasks", tmp_path / "odd", "--seeds", "1")
    assert (refused.code, message in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not JSON"), (b"\xff", "is not UTF-8"), (b"[1]\n", "is a JSON object")]
)
def test_files_that_are_none_are_named(cli, work, tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    (tmp_path / "dev.jsonl").write_bytes(content)
    refused = cli("nlu", "tiny", "--tasks", tmp_path)
    assert refused.code in (2, 3)
    assert message in refused.err


def test_without_scikit_learn_the_extra_is_named(cli, work, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = cli("nlu", "tiny", "--tasks", "animals", "--data", "data")
    assert (refused.code, "pip install 'stackwise[nlu]'" in refused.err) == (2, True)


def test_a_task_of_the_hub_needs_the_package_and_says_what_to_do_instead(cli, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused = cli("nlu", "tiny", "--tasks", "cola")
    assert (refused.code, "pip install 'stackwise[hf]', or give --data FOLDER" in refused.err) == (2, True)


def test_a_task_of_the_hub_is_read_like_a_local_one_and_offline_says_so(cli, work, monkeypatch):
    class Rows(list):
        _fingerprint = "0123"

    class Datasets:
        rows: Rows | None = Rows({"question1": r["sentence"], "question2": "the dog", "label": r["label"]}
                                 for r in (ROW, OTHER) * 4)  # fmt: skip

        def load_dataset(self, repository: str, name: str, split: str) -> Rows:
            assert (repository, name) == ("nyu-mll/glue", "qqp")
            if self.rows is None:
                raise ConnectionError("offline")
            return self.rows

    library = Datasets()
    monkeypatch.setitem(sys.modules, "datasets", library)
    words = ("nlu", "tiny", "--tasks", "qqp", "--seeds", "1", "--json")
    facts = json.loads(cli(*words).out)["tasks"]["qqp"]
    assert (facts["metric"], facts["pair"], facts["rows"]["train"]) == ("f1", True, 8)
    assert list(facts["files"]) == ["nyu-mll/glue/qqp/train", "nyu-mll/glue/qqp/validation"]
    library.rows = None
    refused = cli(*words)
    assert (refused.code, "cannot be fetched (offline); check the network" in refused.err) == (2, True)
    refused = cli(*words, "--split", "test")
    assert "test rows are not public" in refused.err
