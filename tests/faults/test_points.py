"""A kill at every named crash point leaves the state before or the state after, and the work can be taken up."""

from __future__ import annotations

import pytest

from stackwise.checkpoint.store import Store


@pytest.mark.slow
def test_every_crash_point_of_every_work(fault_seed: int) -> None:
    from reliability import points

    record = points.run(1, fault_seed)
    assert record["failures"] == []
    assert record["points"] == record["named"], "each point is passed by some work"
    assert record["kills"] > 100


def test_a_store_that_sweeps_too_early_is_found_out(fault_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness can fail: a commit whose objects are gone, made on purpose."""
    from reliability import points

    original = Store.commit

    def commit(self: Store, *rest: object, **more: object) -> object:
        for path in (self.root / "objects").glob("*/*"):
            path.unlink()
        return original(self, *rest, **more)

    monkeypatch.setattr(Store, "commit", commit)
    record = points.run(2, fault_seed, only="reused object")
    assert any("CheckpointError" in failure for failure in record["failures"])
