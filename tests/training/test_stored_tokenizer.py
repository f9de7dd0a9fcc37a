"""A run is opened with the tokenizer it was trained with, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stackwise import StackWiseConfig, train
from stackwise.data.errors import DamagedDataError
from stackwise.data.tokenizers import train_bpe
from stackwise.training.stored import open_run

TEXT = "to be or not to be, that is the question "


def test_two_ids_that_changed_places_in_a_run_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 60)
    words = train_bpe([TEXT * 20], 290).save(tmp_path / "words.json")
    config = StackWiseConfig.from_dict(
        {
            "model": {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "architecture": {"n_stacks": 1, "blocks_per_stack": 1}},
            "data": {"source": "text", "path": str(tmp_path / "text.txt"), "tokenizer": str(words), "cache_dir": str(tmp_path / "c")},
            "training": {"max_steps": 1, "seq_len": 8, "batch_size": 2, "device": "cpu", "progressive": {"enabled": False}},
            "checkpoint": {"dir": str(tmp_path / "runs")},
            "tracking": {"report": False},
        }
    )  # fmt: skip
    run = train(config, sinks=[])["run_dir"]
    opened = open_run(run)
    path = opened.folder.tokenizer
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    one, two = sorted(vocabulary)[40:42]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(definition))
    with pytest.raises(DamagedDataError, match="put back the file that the run was trained with"):
        open_run(run)
    path.write_text(json.dumps(opened.tokenizer.definition()))
    assert open_run(run).tokenizer.hash == opened.tokenizer.hash
