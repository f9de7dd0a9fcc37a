"""Counted bytes of real stages equal the expectation written down by hand in benchmarks/memory.py."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    path = Path(__file__).parents[2] / "benchmarks/memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counted_bytes_are_the_expected_ones_and_flat_over_the_append_stages(memory):
    rows = memory.measure(stacks=3, blocks=1)
    for row in rows:
        for item, expected in row["expected"].items():
            assert row["counted"][item] == pytest.approx(expected, rel=0.05), (row["stage"], item)
    append = [row["counted"] for row in rows if row["run"] == "append" and row["stage"] != "joint"]
    for item in ("gradients", "moments", "activations"):
        assert append[2][item] == pytest.approx(append[1][item], rel=1e-6)
