"""A bit that flips in any kind of file, and a file that lost its end, is found before a tensor reaches a model."""

from __future__ import annotations

import pytest

from stackwise.checkpoint.objects import Objects


def test_no_damage_of_any_kind_of_file_is_read_as_if_nothing_were_wrong(fault_seed: int) -> None:
    from reliability import flips

    record = flips.run(250, fault_seed)
    assert record["failures"] == []
    assert record["found"] > record["flips"]
    assert all(kind["flips"] > 0 for kind in record["kinds"])


def test_a_store_that_does_not_compare_hashes_is_found_out(
    fault_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reliability import flips
    from stackwise.checkpoint import files

    monkeypatch.setattr(Objects, "read", lambda self, part: files.read(self.path(part.sha256), part.bytes))
    record = flips.run(20, fault_seed, only="append: stack weights")
    assert any("as if nothing were wrong" in failure for failure in record["failures"])
