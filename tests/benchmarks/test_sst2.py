"""The benchmark of sentiment: every attention is trained alike, and nothing is learned from the rows that are scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sst2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sst2

    return sst2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    good, bad = ("a fine warm film", "a fine film"), ("a dull cold film", "a dull film")
    rows = [
        {"sentence": text, "label": label}
        for _ in range(15)
        for label in (0, 1)
        for text in (bad, good)[label]
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_words_are_those_of_the_training_rows(sst2: ModuleType, folder: Path) -> None:
    (folder / "dev.jsonl").write_text(json.dumps({"sentence": "unheard fine", "label": 1}))
    train, scored, vocab = sst2.load(folder, False, sst2.Recipe())
    assert (len(train), vocab) == (60, 2 + 6)
    assert scored[0][0][0] == sst2.UNKNOWN != scored[0][0][1]
    train, scored, _ = sst2.load(folder, True, sst2.Recipe())
    assert (len(train), len(scored)) == (54, 6)


def test_every_row_is_in_one_batch(sst2: ModuleType, folder: Path) -> None:
    train, _, _ = sst2.load(folder, False, sst2.Recipe())
    for generator in (None, torch.Generator().manual_seed(1)):
        listed = [
            (ids[i][mask[i]].tolist(), int(labels[i]))
            for ids, mask, labels in sst2.batches(train, 7, generator)
            for i in range(len(ids))
        ]
        assert sorted(listed) == sorted(train)


@pytest.mark.parametrize("attention", ["bert_style", "mlgka"])
def test_a_classifier_learns_and_a_seed_gives_the_same_again(
    sst2: ModuleType, folder: Path, attention: str
) -> None:
    sizes = {"d_model": 16, "d_ff": 16, "n_heads": 2, "n_layers": 1, "epochs": 8, "batch_size": 6}
    recipe = replace(sst2.Recipe(), dropout=0.0, hidden_words=0.0, **sizes)
    data = sst2.load(folder, False, recipe)
    first, again = (sst2.run(attention, 3, *data, recipe) for _ in range(2))
    assert first["accuracy"] > 0.95
    assert first["last_loss"] == again["last_loss"]
    assert first["attention"] in sst2.table([first, again])
