"""The list of hashes in a folder that is handed around."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

from stackwise.storage.errors import DamagedFileError
from stackwise.storage.sums import FILE, check_sums, write_sums

NAMES = ("a.json", "b.bin", "inner/c.bin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(secrets.token_bytes(100))
    write_sums(tmp_path)
    return tmp_path


def test_an_unchanged_folder_passes_also_the_tool_of_the_system(folder: Path) -> None:
    check_sums(folder, NAMES)
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", FILE], cwd=folder, capture_output=True).returncode == 0
    write_sums(folder)  # again: it does not list itself
    check_sums(folder, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_or_missing_file_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    with pytest.raises(DamagedFileError, match=f"{name} has changed.*SHA256SUMS"):
        check_sums(folder, NAMES)
    check_sums(folder, [other for other in NAMES if other != name])  # what is not read is not asked for
    (folder / name).unlink()
    with pytest.raises(DamagedFileError, match=f"{name} is gone"):
        check_sums(folder, NAMES)


def test_a_folder_without_the_list_is_not_checked(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / NAMES[0]).write_bytes(b"")
    check_sums(folder, NAMES)


@pytest.mark.parametrize("damage", [b"", b"0123  a.json\n", b"\0" * 40])
def test_a_damaged_list_is_no_list(folder: Path, damage: bytes) -> None:
    (folder / FILE).write_bytes(damage)
    with pytest.raises(DamagedFileError, match="SHA256SUMS is damaged: line 1"):
        check_sums(folder, NAMES)


def test_only_the_named_files_are_listed(folder: Path) -> None:
    write_sums(folder, NAMES[:1])
    (folder / NAMES[1]).write_bytes(b"")
    check_sums(folder, NAMES)
