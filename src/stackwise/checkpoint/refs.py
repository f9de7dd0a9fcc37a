"""Small files that point at commits.

    refs/latest         the newest commit's id, for people and scripts; it may lag behind. It tells when a manifest is gone
    refs/pins/<name>    a commit's id: a pin made by hand, which prune obeys
    refs/scores         validation loss by commit
    refs/verified       when all objects of a commit were last read and found whole (seconds since 1970)

A pin is what its owner said and is nowhere else, so a damaged one stops prune. The two tables carry a hash of
themselves; they can be made anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import CommitNameError

COMMIT_ID = re.compile(r"\d{9}-[0-9a-f]{16}")
TABLES = ("scores", "verified")
_PIN = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_RESERVED = re.compile(r"latest|best|forked|imported|stage-\d+|[0-9a-f]{4,}")
_MAX_BYTES = 16 * 2**20


def check_pin(name: str) -> None:
    """Raise CommitNameError unless a pin may have this name."""
    if not _PIN.fullmatch(name):
        raise CommitNameError(
            f"a pin cannot be called {name!r}: a letter, then letters, digits and . _ -, 64 characters at most"
        )
    if _RESERVED.fullmatch(name):
        raise CommitNameError(f"a pin cannot be called {name!r}, which names commits in another way")


class Refs:
    """The folder `refs`; `tmp_dir`, on the same file system, is for files being written."""

    def __init__(self, folder: Path, tmp_dir: Path) -> None:
        self.folder = folder
        self.pin_folder = folder / "pins"
        self._tmp = tmp_dir

    def write_latest(self, commit: str) -> None:
        files.write_atomic(self.folder / "latest", [f"{commit}\n".encode()], tmp_dir=self._tmp, kind="latest")

    def latest(self) -> str | None:
        """The commit that the file names; None where there is no such file, or it names none."""
        path = self.folder / "latest"
        if files.size_of(path) is None:
            return None
        text = bytes(files.read(path, 64)).decode("ascii", "replace").removesuffix("\n")
        return text if COMMIT_ID.fullmatch(text) else None

    def pins(self) -> tuple[dict[str, str], dict[Path, str]]:
        """(commit by pin, what is wrong by damaged file). That the commits exist is for the caller to check."""
        pins, damaged = {}, {}
        for name in files.names(self.pin_folder):
            path = self.pin_folder / name
            if files.size_of(path) is None:
                continue
            text = bytes(files.read(path, 64)).decode("ascii", "replace")
            if _PIN.fullmatch(name) and COMMIT_ID.fullmatch(text.removesuffix("\n")):
                pins[name] = text.removesuffix("\n")
            else:
                damaged[path] = "it does not hold a commit's id"
        return pins, damaged

    def write_pin(self, name: str, commit: str) -> None:
        """Durable when this returns."""
        files.make_dir(self.pin_folder)
        files.write_atomic(
            self.pin_folder / name, [f"{commit}\n".encode()], tmp_dir=self._tmp, kind="reference"
        )
        files.sync_dir(self.pin_folder)

    def remove_pin(self, name: str) -> None:
        files.remove(self.pin_folder / name)
        files.sync_dir(self.pin_folder)

    def table(self, name: str) -> dict[str, float]:
        """Number by commit; empty where there is no such file. Raises ValueError, saying what is wrong with it."""
        assert name in TABLES
        path = self.folder / name
        size = files.size_of(path)
        if size is None:
            return {}
        if size > _MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, {_MAX_BYTES:,} at most")
        digest, _, text = bytes(files.read(path, size)).partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError("its bytes are not those that were written")
        try:
            return {str(commit): float(value) for commit, value in json.loads(text).items()}
        except (TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"it is no table of numbers by commit ({error})") from error

    def write_table(self, name: str, table: Mapping[str, float]) -> None:
        """A table that is lost can be made anew, so its name is not synced."""
        assert name in TABLES
        assert all(math.isfinite(value) for value in table.values())
        text = json.dumps(dict(table), sort_keys=True, separators=(",", ":")).encode() + b"\n"
        head = hashlib.sha256(text).hexdigest().encode() + b"\n"
        files.write_atomic(self.folder / name, [head, text], tmp_dir=self._tmp, kind="reference")
