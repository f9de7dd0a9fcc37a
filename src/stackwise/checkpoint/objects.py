"""The folder of objects: files named by the SHA-256 of their bytes, written once, never changed."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import Part
from stackwise.storage import ops
from stackwise.storage.tensors import Encoded

_NAME = re.compile(r"[0-9a-f]{64}")


class Objects:
    """`folder/ab/<sha256>`; `tmp_dir`, on the same file system, is for files being written."""

    def __init__(self, folder: Path, tmp_dir: Path) -> None:
        self._folder = folder
        self._tmp = tmp_dir
        # Objects whose bytes this process has hashed, and those whose names it has also made durable.
        self._verified: set[str] = set()
        self._durable: set[str] = set()

    def path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    def check_size(self, part: Part) -> None:
        """Raise ValueError, saying what is wrong, unless the file is there with the right size."""
        size = files.size_of(self.path(part.sha256))
        if size is None:
            raise ValueError("is missing")
        if size != part.bytes:
            raise ValueError(f"has {size:,} bytes, expected {part.bytes:,}")

    def read(self, part: Part) -> bytearray:
        """The object's bytes, their hash checked. Raises ValueError, saying what is wrong with the file."""
        self.check_size(part)
        try:
            buffer = files.read(self.path(part.sha256), part.bytes)
        except CheckpointError:
            self.check_size(part)  # swept since it was looked at
            raise
        digest = hashlib.sha256(buffer).hexdigest()
        if digest != part.sha256:
            self._verified.discard(part.sha256)
            raise ValueError(f"has SHA-256 {digest}: its bytes changed after they were written")
        self._verified.add(part.sha256)
        return buffer

    def verify_once(self, part: Part) -> None:
        """Raise ValueError as `read` does; bytes that this process has hashed before are not read again."""
        self.check_size(part)
        if part.sha256 not in self._verified:
            self.read(part)

    def put(self, encoded: Encoded, fresh: list[Path]) -> str:
        """Make sure the object is stored: `shared` if it was, `new`, or `repaired` if it lay there damaged.

        A new file's path is added to `fresh` before it is written. Its name is durable after `sync`.
        """
        path = self.path(encoded.sha256)
        size = files.size_of(path)
        # Reusing a damaged file would make a new commit that cannot be read, so its bytes are checked once.
        if size == encoded.size and (
            encoded.sha256 in self._verified
            or hashlib.sha256(files.read(path, size)).hexdigest() == encoded.sha256
        ):
            self._verified.add(encoded.sha256)
            return "shared"
        files.make_dir(path.parent)
        if size is None:
            fresh.append(path)
        self._durable.discard(encoded.sha256)
        files.write_atomic(path, encoded.chunks, tmp_dir=self._tmp, kind="object")
        self._verified.add(encoded.sha256)
        return "new" if size is None else "repaired"

    def link(self, part: Part, source: Path) -> bool:
        """Take over an object of another store as a second name of its file, whose bytes the caller has checked.

        False where the file system cannot. Its name is durable after `sync`.
        """
        path = self.path(part.sha256)
        files.make_dir(path.parent)
        if files.size_of(path) != part.bytes and not files.link(source, path):
            return False
        self._verified.add(part.sha256)
        return True

    def sync(self, hashes: set[str]) -> None:
        """Make the names of these objects durable.

        Also of those found in the store: the process that wrote them may have died before it did this.
        """
        pending = hashes - self._durable
        for folder in sorted({self.path(sha256).parent for sha256 in pending}):
            files.sync_dir(folder)
        if pending:
            files.sync_dir(self._folder)
        self._durable |= pending

    def discard(self, paths: Iterable[Path]) -> None:
        """Remove object files that no manifest lists."""
        for path in paths:
            self._verified.discard(path.name)
            self._durable.discard(path.name)
            files.remove(path)

    def unlisted(self, listed: set[str]) -> dict[Path, int]:
        """Every object whose hash is not `listed`, with its bytes."""
        found = {}
        for prefix in files.names(self._folder):
            for name in files.names(self._folder / prefix):
                if _NAME.fullmatch(name) and name not in listed:
                    path = self._folder / prefix / name
                    found[path] = files.size_of(path) or 0
        return found

    def sweep(self, listed: set[str]) -> tuple[int, int]:
        """Remove every object whose hash is not `listed`; (how many, their bytes)."""
        garbage = self.unlisted(listed)
        for path in garbage:
            self.discard([path])
            ops.crashpoint("prune.object")
        return len(garbage), sum(garbage.values())
