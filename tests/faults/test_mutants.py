"""The comparison behind the kills notices every piece of state that a resume could forget."""

from __future__ import annotations

import pytest

PIECES = 13
"""Of state that other programs have lost on resume: RNGs, schedules, positions, scales, windows and so on."""


@pytest.mark.slow
def test_every_mutant_is_noticed(fault_seed: int) -> None:
    from reliability import mutants

    record = mutants.run(1, fault_seed)
    assert record["failures"] == []
    assert record["mutants"] == record["noticed"] >= PIECES


def test_a_mutant_that_changes_nothing_goes_unnoticed(
    fault_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reliability import mutants

    monkeypatch.setattr(mutants, "MUTANTS", (mutants.Mutant("nothing", "end to end", stops=(3,)),))
    record = mutants.run(1, fault_seed)
    assert record["noticed"] == 0
    assert "goes unnoticed" in record["failures"][0]
