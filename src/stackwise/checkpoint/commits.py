"""The folder of manifests: which commits there are, and which manifests are damaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import FILE_NAME, MAX_BYTES, Commit, parse

_ATTEMPTS = 1000


class Commits:
    """`folder/<step>-<hash16>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, commit: str) -> Path:
        return self.folder / f"{commit}.json"

    def scan(self) -> tuple[list[Commit], dict[Path, str]]:
        """Readable commits, oldest first, and what is wrong with each damaged manifest."""
        for _ in range(_ATTEMPTS):
            if (found := self._scan_once()) is not None:
                return found
        raise CheckpointError(
            f"{self.folder} changes faster than it can be read; try again", path=self.folder
        )

    def _scan_once(self) -> tuple[list[Commit], dict[Path, str]] | None:
        """None where a manifest was pruned since it was listed: then the list lacks newer ones, maybe all there are."""
        commits, damaged = [], {}
        for name in files.names(self.folder):
            if FILE_NAME.fullmatch(name):
                path = self.folder / name
                try:
                    commits.append(self.read(path)[0])
                except (ValueError, CheckpointError) as error:
                    if not path.is_symlink() and not path.exists():
                        return None
                    if isinstance(error, CheckpointError):
                        raise
                    damaged[path] = str(error)
        return sorted(commits, key=lambda commit: (commit.number, commit.id)), damaged

    def read(self, path: Path) -> tuple[Commit, dict[str, Any]]:
        """A commit and its meta. Raises ValueError, saying what is wrong with the file."""
        size = files.size_of(path)
        if size is None or size > MAX_BYTES:
            raise ValueError(
                "it is no file" if size is None else f"it has {size:,} bytes, {MAX_BYTES:,} at most"
            )
        return parse(path, files.read(path, size), files.modified(path))


def step_of(manifest: Path) -> int:
    return int(manifest.name.partition("-")[0])


def quarantined(folder: Path) -> set[str]:
    """Hashes of the objects that manifests in quarantine name, damaged ones as far as they can be read.

    Those objects stay in the store, so that a commit whose damaged file comes back from a copy is whole again.
    """
    hashes: set[str] = set()
    for name in files.names(folder):
        if name.endswith(".json"):
            size = files.size_of(folder / name)
            text = b"" if size is None else files.read(folder / name, min(size, MAX_BYTES))
            hashes.update(found.decode() for found in re.findall(rb"\b[0-9a-f]{64}\b", bytes(text)))
    return hashes
