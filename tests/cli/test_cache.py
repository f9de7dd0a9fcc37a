"""`stackwise cache`: what it lists, finds damaged and removes."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from stackwise.storage.lock import FileLock
from stackwise.trunk.manager import MemoryManager


def make(directory: Path, prefix: str, boundary: int, used: int, samples: int = 6) -> str:
    """A store of `samples` of 10 samples; its name."""
    manager = MemoryManager(10**9, directory, ram_bytes=0)
    key = {"boundary": boundary, "prefix": prefix * 64, "data": "d" * 64}
    store = manager.open(key, (4, 8), 10)
    store.write(torch.arange(samples), torch.randn(samples, 4, 8))
    manager.close()
    os.utime(directory / store.name / "store.json", (used, used))
    return store.name


@pytest.fixture
def two(folder: Path) -> list[str]:
    """Two stores in ./cache, the one used longest ago first."""
    return [
        make(folder / "cache", "a", 4, 10**9),
        make(folder / "cache", "b", 8, 10**9 + 5, samples=10),
    ]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[70] ^= 4
    path.write_bytes(bytes(data))


def test_ls_lists_what_is_there(cli, folder, two):
    lines = [line for line in cli("cache", "ls").out.splitlines() if line.startswith(" b0")]
    for line, name, boundary, samples, prefix in zip(
        lines, two, ("4", "8"), ("6/10", "10/10"), "ab", strict=True
    ):
        pattern = rf"^ {name} +block {boundary} +{samples} +\S+ k?B +bfloat16 +.+ +{prefix * 8} +d{{8}}"
        assert re.search(pattern, line), line
    listed = json.loads(cli("cache", "ls", "cache", "--json").out)
    assert [row["store"] for row in listed] == two
    assert listed[1]["entries"] == 10
    assert listed[1]["shape"] == [4, 8]
    for row in listed:
        assert row["bytes"] == sum(path.stat().st_size for path in Path(row["path"]).iterdir())


def test_without_any(cli, folder):
    for words in ("ls", "verify"):
        assert cli("cache", words) == (0, "No stores in cache.\n", "")
    assert cli("cache", "clear").out == "removed 0 stores, 0 bytes freed\n"
    assert json.loads(cli("cache", "ls", "--json").out) == []


def test_verify_counts_whole_entries(cli, folder, two):
    result = cli("cache", "verify")
    assert result.code == 0
    assert f"{two[0]}: 6 of 6 entries are whole\n" in result.out
    assert f"{two[1]}: 10 of 10 entries are whole\n" in result.out
    one = json.loads(cli("cache", "verify", "--store", two[1], "--json").out)
    assert one == [{"store": two[1], "entries": 10, "whole": 10, "damage": []}]


def test_verify_names_the_damaged_file_and_ends_with_3(cli, folder, two):
    shard = folder / "cache" / two[1] / "shard-00000.bin"
    damage(shard)
    result = cli("cache", "verify")
    assert result.code == 3
    assert f"{two[0]}: 6 of 6" in result.out
    assert f"{two[1]}: 9 of 10" in result.out
    assert f"cache/{two[1]}/shard-00000.bin: activations of sample 1" in result.err
    assert "is computed again" in result.err
    assert cli("cache", "verify", "--store", two[0]).code == 0
    assert cli("cache", "verify", "--json").code == 3


def test_a_store_without_a_readable_header_is_listed_found_and_removed(cli, folder, two):
    (folder / "cache" / two[0] / "store.json").write_text("{}")
    result = cli("cache", "ls")
    assert re.search(rf"^ {two[0]} +- +- +\S+ B +damaged", result.out, re.MULTILINE)
    assert "note: cache/" in result.err
    assert cli("cache", "verify").code == 3
    assert cli("cache", "clear", "--store", two[0]).code == 0
    assert cli("cache", "verify").code == 0


def test_clear_removes_the_named_or_all(cli, folder, two):
    size = {name: sum(p.stat().st_size for p in (folder / "cache" / name).iterdir()) for name in two}
    (folder / "cache" / "mine.txt").write_text("keep")
    assert cli("cache", "clear", "--store", two[1]).out == f"removed 1 store, {size[two[1]]:,} bytes freed\n"
    assert sorted(path.name for path in (folder / "cache").iterdir()) == [two[0], "mine.txt"]
    cleared = json.loads(cli("cache", "clear", "cache", "--yes", "--json").out)
    assert cleared == {"removed": [two[0]], "bytes": size[two[0]]}
    assert [path.name for path in (folder / "cache").iterdir()] == ["mine.txt"]


def test_clear_asks(cli, folder, two, monkeypatch):
    result = cli("cache", "clear", stdin="")
    assert result.code == 2
    assert re.search(r"removing all 2 stores of cache \(.+B\) needs a yes, .*--yes, or name", result.err)
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: asked.append(question))
    assert cli("cache", "clear").out == "Nothing was removed.\n"
    assert re.fullmatch(r"Remove all 2 stores of cache \(.+B\)\?", asked[0])
    monkeypatch.setattr("typer.confirm", lambda question: True)
    assert cli("cache", "clear").out.startswith("removed 2 stores")


def test_a_store_that_a_run_writes_to_stays(cli, folder, two):
    lock = FileLock(folder / "cache" / two[0] / "LOCK")
    assert lock.acquire()
    result = cli("cache", "clear", "--yes")
    assert result.code == 4
    assert f"cache/{two[0]} is being written by another process" in result.err
    assert result.out.startswith("removed 1 store,")
    lock.release()
    assert cli("cache", "clear", "--yes").code == 0


def test_wrong_names(cli, folder, two):
    wrong = two[0][:-1] + "x"
    for verb in ("verify", "clear"):
        result = cli("cache", verb, "--store", wrong)
        assert result.code == 2
        assert f"there is no store '{wrong}' in cache; did you mean '{two[0]}'?" in result.err
    assert "there are 2: `stackwise cache ls cache`" in cli("cache", "clear", "--store", "zzz").err
    for directory in ("nowhere", "text.txt"):
        result = cli("cache", "ls", directory)
        assert result.code == 2
        assert f"{directory} is not a folder; it is the value of training.progressive.cache_dir" in result.err
    assert len(json.loads(cli("cache", "ls", "--json").out)) == 2


@pytest.mark.parametrize("verb", ["cache", "cache ls", "cache verify", "cache clear"])
def test_help_has_examples(cli, verb):
    result = cli(*verb.split(), "--help")
    assert result.code == 0
    assert "Examples:\n    stackwise cache" in result.out
