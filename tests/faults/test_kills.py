"""kill -9 at random times, over and over, changes nothing of what a run comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

# One slice of the cases per test, so that a failure names its kind of run; 200 kills in all.
SLICES = range(4)
KILLS = 50


@pytest.mark.slow
@pytest.mark.parametrize("part", SLICES)
def test_a_killed_run_ends_as_the_undisturbed_one(part: int, tmp_path: Path, fault_seed: int) -> None:
    from reliability import kills, runs

    chosen = runs.CASES[part :: len(SLICES)]
    record = kills.run(KILLS, fault_seed, cases=chosen, disk=tmp_path)
    assert record["failures"] == []
    assert record["kills"] >= KILLS
    # how many depends on the machine and its load; none would mean that training is never reached
    assert sum(row["at"].get("training and saving", 0) for row in record["cases"]) > 0


def test_a_run_that_comes_to_another_end_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness can fail: a resume that loses the moments, made on purpose."""
    from reliability import kills, runs
    from stackwise.training import state

    case = runs.BY_NAME["end to end"]
    made = kills.Kills([case], 1, (tmp_path, tmp_path))
    try:
        made.undisturbed(case, 0)
        monkeypatch.setattr(state, "load_optimizer_state", lambda store, commit: {})
        # Whether a kill falls behind a save depends on the machine and its load, so one run of many is enough.
        results = (made.run(index) for index in range(40))
        assert any("another end" in failure for result in results for failure in result.failures)
    finally:
        made.close()
