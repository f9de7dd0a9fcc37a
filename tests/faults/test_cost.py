"""What a run writes: parts that did not change are not written again."""

from __future__ import annotations

from pathlib import Path


def test_an_append_run_writes_a_quarter_of_full_saves(tmp_path: Path, fault_seed: int) -> None:
    from reliability import cost

    record = cost.run(1, fault_seed, disk=tmp_path)
    assert record["failures"] == []
    assert record["bytes"]["saves"] == record["bytes"]["stacks"] == 8
    assert 0.1 < record["bytes"]["share"] <= cost.BYTES
    assert "speed" not in record, "times belong into the long run"
