"""Power loss: what was reported durable is there in every state that the disk can be left in."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stackwise.storage import ops


def test_every_promise_holds_in_every_state(fault_seed: int) -> None:
    from reliability import power

    record = power.run(2000, fault_seed)
    assert record["failures"] == []
    assert record["states"] >= 1900
    assert record["went_on"] > 0
    assert all(work["states"] for work in record["works"])


@pytest.mark.parametrize("forgotten", ["every file", "every folder"])
def test_a_store_that_forgets_to_sync_is_found_out(
    forgotten: str, fault_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model can fail: without the syncs of files, or of folders, a promise is broken."""
    from reliability import disk_model, power, power_work

    original = disk_model.Recorder._fsync

    def unseen(self: Any, real: Callable[[int], None], fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) != (forgotten == "every folder"):
            original(self, real, fd)

    monkeypatch.setattr(disk_model.Recorder, "_fsync", unseen)
    works = [work for work in power_work.WORKS if work.name == "commits and prunes"]
    record = power.run(300, fault_seed, works=works)
    assert any("commit" in failure or "Checkpoint" in failure for failure in record["failures"])


def test_the_states_of_one_write_are_all_that_can_be(tmp_path: Path, fault_seed: int) -> None:
    from reliability.disk_model import Recorder, after, choices

    root = tmp_path / "root"
    root.mkdir()
    with Recorder(root) as recorder:
        ops.write_atomic(root / "a", [b"old"], kind="text")
        ops.sync_dir(root)
        safe = len(recorder.trace.ops)
        ops.write_atomic(root / "a", [b"x" * 5000], kind="text")
    trace = recorder.trace
    assert trace.unsafe(safe) == []
    found = {}
    for end in range(safe, len(trace.ops) + 1):
        for choice in choices(trace, end, random.Random(fault_seed), 50):
            state = after(trace, end, choice)
            found.setdefault(state.files["a"], set()).add(state.files.get(".a.new"))
    # the name a: the old file or the new one whole, for its bytes were synced before it was renamed
    assert found.keys() == {b"old", b"x" * 5000}
    # the new file by its first name: not there, whole, cut off or zeros
    assert found[b"old"] == {None, b"", b"x" * 512, b"x" * 4096, bytes(5000), b"x" * 5000}
    assert (root / "a").read_bytes() == b"x" * 5000
