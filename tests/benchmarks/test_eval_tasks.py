"""The record of zero-shot tasks says what the page says, and both sides found the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
