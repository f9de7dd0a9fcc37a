"""Fuzzing: every reader of files takes a changed file or refuses it by a typed error, soon and in little memory."""

from __future__ import annotations

import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import pytest

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*"))


def seed() -> int:
    return int(os.environ.get("STACKWISE_FAULT_SEED", secrets.randbelow(10**6)))


def test_ten_thousand_changed_files_are_taken_or_refused_by_name(tmp_path: Path) -> None:
    from reliability import fuzz
    from reliability.fuzz_targets import TARGETS

    record = fuzz.run(10_000, seed(), keep=tmp_path)
    assert record["failures"] == []
    assert record["kinds"].keys() == TARGETS.keys()
    assert record["inputs"] == record["accepted"] + record["refused"] >= 9_900
    for kind, result in record["kinds"].items():
        assert result["accepted"] > 0, kind
        assert sum(result["refused"].values()) > 0, kind
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_once_failed_is_refused_now(path: Path) -> None:
    from reliability import fuzz

    assert fuzz.replay(path) != ""


def test_an_input_follows_from_its_number_alone(tmp_path: Path) -> None:
    from reliability import fuzz
    from reliability.fuzz_targets import TARGETS

    target = TARGETS["header"](tmp_path)
    again = [fuzz.input_of(target, 3, "header", n) for n in range(40)]
    assert again == [fuzz.input_of(target, 3, "header", n) for n in range(40)]
    assert len({data for _, data in again}) > 35
    assert again != [fuzz.input_of(target, 4, "header", n) for n in range(40)]


def crash(data: bytes) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(data: bytes) -> None:
    while True:
        pass


def slow(data: bytes) -> None:
    began = time.thread_time()
    while time.thread_time() - began < 1.2:
        pass


def bomb(data: bytes) -> None:
    bytearray(2**29)


def untyped(data: bytes) -> None:
    raise ZeroDivisionError("not foreseen")


def silent(data: bytes) -> None:
    from stackwise.storage.errors import UnsafeInputError

    raise UnsafeInputError


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (crash, "ended by signal 9"),
        (hang, "_Hang: more than 2 seconds"),
        (slow, "took 1."),
        (bomb, "MemoryError"),
        (untyped, "ZeroDivisionError: not foreseen"),
        (silent, "UnsafeInputError says nothing"),
    ],
)
def test_a_reader_that_fails_is_found_with_its_input(
    fault: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness can fail: each kind of fault is noticed, its input is kept, and the rest goes on."""
    from reliability import fuzz
    from reliability.fuzz_targets import Headers

    original, wholes = Headers.read, {sample.data for sample in Headers(tmp_path).samples}
    chosen: list[bytes] = [fuzz.input_of(Headers(tmp_path), 1, "header", 5)[1]]

    def read(self: Any, name: str, data: bytes) -> None:
        if data in chosen and data not in wholes:
            fault(data)
        original(self, name, data)

    monkeypatch.setattr(Headers, "read", read)
    record = fuzz.run(30, 1, ["header"], keep=tmp_path / "kept")
    (line,) = record["failures"]
    assert line.startswith("header 5: ")
    assert says in line
    assert "--kinds header --seed 1 --first 5 --inputs 1" in line
    assert record["inputs"] == 30
    assert [path.read_bytes() for path in (tmp_path / "kept").iterdir()] == chosen
