"""Greedy generation chooses the tokens that Transformers' Llama chooses with the same weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "generation.py"
    spec = importlib.util.spec_from_file_location("benchmark_generation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_compares_equal_work(benchmark: ModuleType) -> None:
    results = benchmark.measure(batch_sizes=(1, 3), turns=1, n_prompt=5, n_new=40)
    assert [row["batch"] for row in results] == [1, 3]
    for row in results:
        assert row["equal_tokens"] == 1.0
        assert row["ratio"] > 0
