"""The benchmark of families: every family is in it, and both sides train the same loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from stackwise.interop.families import families

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import family_steps

    return family_steps


def test_every_family_is_measured(bench: ModuleType) -> None:
    assert list(bench.MODELS) == list(families())
    record = json.loads((BENCHMARKS / "records" / "family_steps.json").read_text())
    assert record["families"].keys() == bench.MODELS.keys()


def test_both_sides_learn_the_same(bench: ModuleType) -> None:
    for name in ("BATCH", "LENGTH"):
        setattr(bench, name, 2 if name == "BATCH" else 16)
    steps, parameters = bench.contenders("llama")
    losses = {name: [float(step()) for _ in range(2)] for name, step in steps.items()}
    assert parameters > 1_000_000
    assert losses["StackWise"] == pytest.approx(losses["Transformers"], rel=1e-4)
    assert losses["StackWise"][1] < losses["StackWise"][0]
    rounds = bench.measure(steps, 0.0)
    assert [len(times) for times in rounds.values()] == [5, 5]
