"""The faults of benchmarks/reliability, in the counts that a pull request can wait for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from stackwise.tracking import folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(folder, "environment", folder.environment)  # which children look up only once
    yield
    gc.unfreeze()
