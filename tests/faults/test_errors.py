"""A disk that is full, fails or is forbidden at any call: the right exit code, nothing left behind, nothing lost."""

from __future__ import annotations

import contextlib

import pytest

from stackwise.storage import ops


@pytest.mark.slow
def test_an_error_at_any_call_ends_well(fault_seed: int) -> None:
    from reliability import errors

    record = errors.run(1, fault_seed)
    assert record["failures"] == []
    assert record["errors"] > 50
    assert record["real"]["limits"] == len(errors.LIMITS)


def test_a_swallowed_error_is_found_out(fault_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness can fail: bytes that could not be written are left out in silence."""
    from reliability import errors

    def careless(fd: int, data: object) -> None:
        with contextlib.suppress(OSError):
            ops.write(fd, memoryview(data).cast("B"))  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "write_all", careless)
    record = errors.run(6, fault_seed, only="first save")
    assert record["failures"]
