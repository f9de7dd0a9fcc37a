"""SHA-256 of the files of a folder that is handed around, in a file that `sha256sum -c` checks as well."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from stackwise.storage import ops
from stackwise.storage.errors import DamagedFileError
from stackwise.storage.regular import open_regular

FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._/-]+)")
_MAX_BYTES = 2**20


def write_sums(folder: Path, names: Iterable[str] | None = None) -> None:
    """List files of `folder`, by default all that are in it and below. Durable with the folder's own `sync_dir`."""
    if names is None:
        found = (Path(place) / name for place, _, files in os.walk(folder) for name in files)
        names = [path.relative_to(folder).as_posix() for path in found]
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(names) if name != FILE]
    ops.write_atomic(folder / FILE, ["".join(lines).encode()], kind="export")


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Raise DamagedFileError where one of these files is not the one that was listed.

    A folder without a list, as others make them, is not checked, nor are files that the list does not name.
    """
    if (folder / FILE).exists() and (wrong := damaged(folder, names)) is not None:
        path, what = wrong
        raise DamagedFileError(
            f"{path} {what}. Fetch or write the folder again; delete {FILE} if the change is your own."
        )


def damaged(folder: Path, names: Iterable[str]) -> tuple[Path, str] | None:
    """The first of these files that is not the one that was listed, with what is wrong; null: they all are."""
    try:
        with open(open_regular(folder / FILE), "rb") as file:
            lines = file.read(_MAX_BYTES).decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return folder / FILE, "is gone"
    listed = [_LINE.fullmatch(line) for line in lines]
    if not lines or None in listed:
        number = 1 + (listed.index(None) if None in listed else 0)
        return folder / FILE, f"is damaged: line {number} is no SHA-256 and a name"
    wanted = {found[2]: found[1] for found in listed if found is not None}
    for name in names:
        if name in wanted:
            try:
                found = _sha256(folder / name)
            except FileNotFoundError:
                return folder / name, f"is gone, which {FILE} lists"
            if found != wanted[name]:
                return (
                    folder / name,
                    f"has changed since it was written: its SHA-256 is {found}, {FILE} says {wanted[name]}",
                )
    return None


def _sha256(path: Path) -> str:
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
