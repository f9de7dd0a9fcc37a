"""The benchmark of encoder steps: models of one size, the same corruption, honest losses on both sides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import encoder_step

    return encoder_step


def test_the_contenders_are_of_one_size_and_learn(bench: ModuleType) -> None:
    shape = bench.Shape(32, 2, 4, 64, 8, 900)
    torch.manual_seed(0)
    ids = torch.randint(0, shape.mask_id, (shape.batch, shape.seq_len))
    sizes = []
    sides: list[tuple[Any, bool]] = [(bench.stackwise, False), (bench.bert, False), (bench.bert, True)]
    for build, by_hand in sides:
        model, loss = build(shape, ids, True) if by_hand else build(shape, ids)
        sizes.append(sum(p.numel() for p in model.parameters()))
        step = bench.stepper(model, loss)
        first = float(step())
        assert first == pytest.approx(math.log(shape.vocab_size), abs=1.0)
        before = [p.clone() for p in model.parameters()]
        assert float(step()) != first  # another corruption of the same rows
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert sum(changed) > 0.9 * len(changed)
    assert sizes[1] == sizes[2]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_the_head_by_hand_has_the_loss_of_bert(bench: ModuleType) -> None:
    shape = bench.Shape(32, 2, 4, 64, 8, 900)
    ids = torch.randint(0, shape.mask_id, (shape.batch, shape.seq_len))
    losses = []
    for by_hand in (False, True):
        torch.manual_seed(3)
        _, loss = bench.bert(shape, ids, by_hand)
        losses.append(loss().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_reports_every_contender(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape(128, 2, 2, 16, 2, 8000))
    record, shown = tmp_path / "figures.json", []
    found = bench.main(["--shapes", "small", "--seconds", "0", "--json", str(record)], shown.append)
    assert json.loads(record.read_text()) == json.loads(json.dumps(found))
    rows = found["shapes"]["small"]["rows"]
    assert list(rows) == ["Transformers BERT", "StackWise", "StackWise, PyTorch's products"]
    assert rows["Transformers BERT"]["vs_bert"] == 1.0
    assert all(row["ms_per_step"] > 0 for row in rows.values())
    assert len(shown) == 2 + len(rows)


def test_models_of_different_size_are_not_compared(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = bench.stackwise
    monkeypatch.setattr(bench, "stackwise", lambda shape, ids: build(shape._replace(n_layers=4), ids))
    with pytest.raises(RuntimeError, match="differ in size"):
        bench.contenders(bench.Shape(64, 1, 2, 16, 2, 400), False)
