"""The record of zero-shot tasks says what the page says, and both sides found the same."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from stackwise.training.run import train
from stackwise.training.stored import open_run

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_figures_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks/records/eval-tasks.json").read_text())
    page = (ROOT / "docs/benchmarks.md").read_text().partition("## Zero-shot tasks")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+ \| [\d.]+) \|$", page, re.MULTILINE))
    assert rows == {
        name: f"{task['stackwise']} | {task['lm_eval']}" for name, task in record["tasks"].items()
    }
    assert all(task["stackwise"] == task["lm_eval"] for task in record["tasks"].values())
    assert record["equal"]
    seconds = record["cpu_seconds"]
    everything = min(seconds["lm_eval"].values()) / min(seconds["stackwise"])
    assert f"{everything:.2f} times faster in all" in page.replace("\n", " ")
    assert f"{record['times_faster_scoring']:.2f} times in the likelihoods alone" in page.replace("\n", " ")
    assert f"at most {record['largest_difference_nats']:.1e}".replace("e-0", "e-") in page.replace("\n", " ")


def test_our_side_scores_the_files_of_tasks(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("eval_tasks")
    opened = open_run(train(tiny(data__tokenizer="byte"), sinks=[])["run_dir"])
    rows = [{"sentence_good": "the fox jumps.", "sentence_bad": "the fox jump."}] * 3
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = program.ours(opened, [tmp_path / "pairs.jsonl"])
    assert found["acc"] in ({"pairs": 0.0}, {"pairs": 1.0})
    assert len(found["nats"]) == 6
    assert 0 < found["scoring_seconds"] <= found["seconds"]
