"""The program of the fine-tuned racks: what it reads, that it runs from text to table, and the table of its record."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
SECRET = "zebra"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nlu_program", ROOT / "benchmarks/nlu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(program: ModuleType, tmp_path: Path) -> Path:
    """A folder as the program wants it; rows of dev hold a word that is nowhere else."""
    folder, draw = tmp_path / "data", random.Random(0)
    words = ["red", "blue", "dog", "cat", "sun", "sea"]

    def text(length: int = 5) -> str:
        return " ".join(draw.choice(words) for _ in range(length))

    for name in ("wikitext2/train.txt", "wikitext2/valid.txt", "wiki_demo/wiki_demo.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("= title =\n" + "".join(f"The {text(60)} .\n" for _ in range(40)))
    (folder / "c4_demo").mkdir()
    (folder / "c4_demo/c4_demo.jsonl").write_text(json.dumps({"text": text()}) + "\n")
    for task in program.TASKS:
        (folder / task).mkdir()
        for part, extra in (("train", ""), ("dev", f" {SECRET}")):
            rows = []
            for number in range(12):
                keys = ("sentence",) if task in ("sst2", "cola") else ("sentence1", "sentence2")
                row = {key: text() + extra for key in keys}
                rows.append(row | ({"score": number % 6} if task == "stsb" else {"label": number % 2}))
            (folder / task / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_nothing_of_what_is_scored_is_read_before(program, data):
    found = program.texts(data)
    texts = 2 * 40 + 41 + 1  # titles of wikitext2 are left out
    assert len(found) == texts + 12 * 2 + 12 * 2 * 3
    assert not any(SECRET in text for text in found)
    assert all(text == text.lower() for text in found)
    assert found == program.texts(data)


@pytest.mark.parametrize("model", ["encoder", "causal"])
def test_it_runs_from_text_to_the_table_on_the_page(program, data, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda fd: None)
    monkeypatch.setattr(program, "VOCABULARY", 400)
    small = program.SHARED.replace("d_model: 192", "d_model: 24").replace("batch_size: 32", "batch_size: 4")
    monkeypatch.setattr(program, "SHARED", small)
    record, page = tmp_path / "nlu.json", tmp_path / "page.md"
    words = ["nlu.py", "--data", str(data), "--model", model, "--steps", "2", "--seeds", "1"]
    words += ["--work", str(tmp_path / "work"), "--record", str(record)]
    monkeypatch.setattr("sys.argv", words)
    program.main()
    found = json.loads(record.read_text())[model]
    assert list(found["tasks"]) == list(program.TASKS)
    assert found["parameters"] < 10e6
    assert found["pre-training"]["cpu_seconds"] > 0
    page.write_text(f"before\n{program.BEGIN}old\n{program.END}after\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["nlu.py", "--page", str(page), "--record", str(record)])
    program.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    figures = found["tasks"]["stsb"]
    own, bag = figures["summary"]["pearson"]["mean"], figures["bag_of_words"]["pearson"]
    assert f"| {model} | stsb, pearson | 12 | {own:.3f}, " in text
    assert f"| {own - bag:+.3f} |" in text


def test_the_page_has_the_table_of_the_record(program):
    record = json.loads((ROOT / "benchmarks/records/nlu.json").read_text())
    assert program.table(record) in (ROOT / "docs/nlu.md").read_text()
    assert all(found["parameters"] <= 10e6 for found in record.values())
    assert all(len(task["seeds"]) == 3 for found in record.values() for task in found["tasks"].values())
