"""The faults of benchmarks/reliability, in the counts that a pull request can wait for."""

from __future__ import annotations

import gc
import os
import secrets
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


@pytest.fixture
def fault_seed() -> int:
    """Another one each time, unless STACKWISE_FAULT_SEED names it. Misses print it with the command for them."""
    return int(os.environ.get("STACKWISE_FAULT_SEED", secrets.randbelow(10**6)))
