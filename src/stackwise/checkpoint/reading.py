"""Reading commits: nothing is handed out before its hash was checked, and damage is told with the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from stackwise.checkpoint import files
from stackwise.checkpoint.commits import Commits, step_of
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import Commit, Part
from stackwise.checkpoint.naming import Names
from stackwise.checkpoint.objects import Objects
from stackwise.checkpoint.refs import Refs
from stackwise.config.errors import did_you_mean
from stackwise.storage.tensors import decode

_T = TypeVar("_T")


class Reader(Names):
    """The part of a store that reads; it needs no lock and never waits for one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tmp = root / "tmp"
        self.quarantine = root / "quarantine"
        super().__init__(Commits(root / "commits"), Refs(root / "refs", self.tmp))
        self.objects = Objects(root / "objects", self.tmp)

    def latest(self) -> Commit | None:
        """The newest commit, or None in an empty store.

        Raises CheckpointError, never returning an older one instead, when the newest manifest is damaged
        or gone, or one of its objects is missing or has the wrong size.
        """
        commits, damaged = self.manifests.scan()
        newest = commits[-1] if commits else None
        # The number inside a damaged manifest cannot be read; its step, in the name, can.
        blocking = [path for path in damaged if newest is None or step_of(path) >= newest.step]
        if blocking:
            path = blocking[-1]
            raise CheckpointError(
                f"the manifest {path} is damaged: {damaged[path]}. {self.way_out(commits, blocking)}",
                path=path,
            )
        if (gone := self._gone()) is not None:
            if self.commits()[-1:] != commits[-1:]:
                return self.latest()  # a writer went on meanwhile
            raise CheckpointError(
                f"the manifest {gone} is gone: refs/latest names it. {self.way_out(commits, [gone])}",
                path=gone,
            )
        if newest is not None:
            try:
                for part in newest.parts.values():
                    self.checked(newest, part, self.objects.check_size)
            except CheckpointError:
                if files.size_of(newest.path) is None:
                    return self.latest()  # a writer made a newer commit and pruned this one meanwhile
                raise
        return newest

    def load(self, commit: Commit, part: str) -> dict[str, Tensor]:
        """The tensors of one part, on the CPU, free to be changed.

        The file's hash is checked before any tensor is made. Raises CheckpointError.
        """
        entry = commit.parts.get(part)
        if entry is None:
            hint = did_you_mean(part, commit.parts) or f"it has {', '.join(sorted(commit.parts))}"
            raise CheckpointError(
                f"commit {commit.id} has no part {part!r}; {hint}", path=commit.path, part=part
            )
        return self.checked(commit, entry, lambda entry: decode(self.objects.read(entry)))

    def read(self, commit: Commit, part: Part) -> bytearray:
        """The bytes of one part's object, their hash checked. Raises CheckpointError."""
        return self.checked(commit, part, self.objects.read)

    def meta(self, commit: Commit) -> dict[str, Any]:
        """The run state that was given to `commit`, as JSON keeps it. Raises CheckpointError."""
        return self.read_manifest(commit.path)[1]

    def verify(self, commit: Commit) -> None:
        """Read every object of a commit and check its hash. Raises CheckpointError for the first damaged one."""
        for part in commit.parts.values():
            self.checked(commit, part, self.objects.read)

    # What is said about damage

    def read_manifest(self, path: Path) -> tuple[Commit, dict[str, Any]]:
        try:
            return self.manifests.read(path)
        except ValueError as error:
            commits, damaged = self.manifests.scan()
            raise CheckpointError(
                f"the manifest {path} is damaged: {error}. {self.way_out(commits, list(damaged) or [path])}",
                path=path,
            ) from error

    def checked(self, commit: Commit, part: Part, check: Callable[[Part], _T]) -> _T:
        """`check(part)`, whose ValueError says what is wrong with the object, as a CheckpointError."""
        try:
            return check(part)
        except ValueError as error:
            raise self._damage(commit, part, str(error)) from error

    def _damage(self, commit: Commit, part: Part, what: str) -> CheckpointError:
        path = self.objects.path(part.sha256)
        if files.size_of(commit.path) is None:
            return CheckpointError(
                f"commit {commit.id} was pruned; run the same command again to read a newer one",
                path=path,
                part=part.name,
            )
        commits, _ = self.manifests.scan()
        hurt = [
            other.path for other in commits if part.sha256 in {entry.sha256 for entry in other.parts.values()}
        ]
        return CheckpointError(
            f"part {part.name!r} of commit {commit.id} is damaged: {path} {what}. {self.way_out(commits, hurt)}",
            path=path,
            part=part.name,
        )

    def way_out(self, commits: list[Commit], hurt: list[Path]) -> str:
        """Which commit is not hurt, and the commands that continue from it."""
        intact = [commit for commit in commits if commit.path not in hurt and self.has_objects(commit)]
        if not intact:
            return "No other commit is intact: restore the file from a copy, or train anew with checkpoint.overwrite=true."
        return (
            f"Hurt by it: {', '.join(path.stem for path in hurt)}. Not hurt: {intact[-1].id} (step {intact[-1].step}). "
            f"Restore the file from a copy; or set the hurt commits aside, which deletes nothing, and run the same "
            f"command again to go on from there:\n  {self.repair_command}"
        )

    def _gone(self) -> Path | None:
        """The manifest that refs/latest names, where it is neither there nor in quarantine/. The ref may lag behind,
        but prune puts it right before it deletes what it names."""
        named = self.refs.latest()
        if named is None:
            return None
        path = self.manifests.path(named)
        there = any(files.size_of(place / path.name) is not None for place in (path.parent, self.quarantine))
        return None if there else path

    def has_objects(self, commit: Commit) -> bool:
        try:
            for part in commit.parts.values():
                self.objects.check_size(part)
        except ValueError:
            return False
        return True
