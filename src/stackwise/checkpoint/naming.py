"""What the commits of a store are called: ids, pins, steps, the best and the newest."""

from __future__ import annotations

import abc
import contextlib
import math
import re
import shlex
from pathlib import Path

from stackwise.checkpoint import files
from stackwise.checkpoint.commits import Commits
from stackwise.checkpoint.errors import CheckpointError, CommitNameError
from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.refs import TABLES, Refs, check_pin
from stackwise.config.errors import did_you_mean

_SHOWN = 8


class Names(abc.ABC):
    """The part of a store that finds, pins and scores commits."""

    root: Path
    quarantine: Path

    def __init__(self, manifests: Commits, refs: Refs) -> None:
        self.manifests = manifests
        self.refs = refs

    @abc.abstractmethod
    def latest(self) -> Commit | None: ...

    @abc.abstractmethod
    def writing(self) -> contextlib.AbstractContextManager[None]: ...

    def commits(self) -> list[Commit]:
        """All readable commits, oldest first. Damaged manifests are left out; `latest` reports them."""
        return self.manifests.scan()[0]

    def find(self, name: str) -> Commit:
        """The commit that `name` stands for: `latest`, `best` (lowest validation loss), `step:120` (the newest of
        that step), a pin, or the beginning of an id or of its hash.

        Raises CommitNameError when none or several do, CheckpointError as `latest` does.
        """
        commits = self.commits()
        if name == "latest":
            newest = self.latest()
            found = [] if newest is None else [newest]
        elif name == "best":
            scores = self.scores()
            known = [commit for commit in commits if commit.id in scores]
            found = sorted(known, key=lambda commit: scores[commit.id])[:1]
            if commits and not found:
                raise CommitNameError(
                    f"no commit of {self.root} has a validation loss yet, so none is the best"
                )
        elif name.startswith("step:"):
            found = [commit for commit in commits if str(commit.step) == name.removeprefix("step:")][-1:]
        else:
            pinned = self.pins().get(name)
            found = [commit for commit in commits if commit.id == pinned]
            if not found and re.fullmatch(r"[0-9a-f-]{1,64}", name):
                found = [c for c in commits if c.id.startswith(name) or c.sha256.startswith(name)]
        if len(found) != 1:
            raise CommitNameError(self._no_such(name, commits, found))
        return found[0]

    def pins(self) -> dict[str, str]:
        """Commit id by pin: the run's own, of which the newest commit of a name counts, and those made by hand.

        Raises CheckpointError when one made by hand is damaged.
        """
        commits = self.commits()
        pins = {commit.pin: commit.id for commit in commits if commit.pin is not None}
        return {**pins, **self.own_pins(commits)}

    def own_pins(self, commits: list[Commit]) -> dict[str, str]:
        """Those made by hand, of a store with these commits. Raises CheckpointError when one is damaged or its commit
        is gone; one whose commit lies in quarantine/ counts still."""
        pins, damaged = self._pins(commits)
        if damaged:
            path, what = next(iter(damaged.items()))
            raise CheckpointError(
                f"the pin {path} is damaged: {what}. The commits are not affected. Set it aside, and pin its commit "
                f"again:\n  {self.repair_command}",
                path=path,
            )
        return pins

    def pin(self, name: str, commit: Commit) -> None:
        """Keep a commit from being pruned, whatever else is, until `unpin(name)`. Durable when this returns.

        Raises CommitNameError when the name is not possible or stands for another commit.
        """
        check_pin(name)
        with self.writing():
            held = self.pins().get(name)
            if held not in (None, commit.id):
                raise CommitNameError(
                    f"the pin {name!r} is on {held} already; remove it first, or choose another name"
                )
            if not any(commit.id == other.id for other in self.commits()):
                raise CommitNameError(f"{commit.id} is no commit of {self.root}")
            self.refs.write_pin(name, commit.id)

    def unpin(self, name: str) -> str:
        """Remove a pin made by hand; the id of the commit it was on. Raises CommitNameError when there is none."""
        with self.writing():
            pins = self.own_pins(self.commits())
            if name not in pins:
                if name in self.pins():
                    raise CommitNameError(
                        f"{name!r} is a pin of the run itself, a part of its commit; "
                        "`stackwise ckpt prune --drop-stages` passes over those"
                    )
                hint = did_you_mean(name, pins) or f"there are {', '.join(sorted(pins)) or 'none'}"
                raise CommitNameError(f"no pin is called {name!r}; {hint}")
            self.refs.remove_pin(name)
            return pins[name]

    def scores(self) -> dict[str, float]:
        """Validation loss by commit id. Raises CheckpointError when the table is damaged."""
        try:
            return self.refs.table("scores")
        except ValueError as error:
            path = self.refs.folder / "scores"
            raise CheckpointError(
                f"the table of validation losses {path} is damaged: {error}. The commits are not affected. Make it "
                f"anew from the run's metrics:\n  {self.repair_command}",
                path=path,
            ) from error

    def score(self, step: int, loss: float) -> Commit | None:
        """Note the validation loss of the newest commit of a step. Returns the commit; None, noting nothing, where
        there is none or the loss is not finite."""
        found = [commit for commit in self.commits() if commit.step == step][-1:]
        if not found or not math.isfinite(loss):
            return None
        with self.writing():
            there = {commit.id for commit in self.commits()}
            table = {name: value for name, value in self.scores().items() if name in there}
            self.refs.write_table("scores", {**table, found[0].id: loss})
        return found[0]

    def verified(self) -> dict[str, float]:
        """When each commit was last verified, in seconds since 1970; a damaged table knows nothing."""
        try:
            return self.refs.table("verified")
        except ValueError:
            return {}

    def damaged(self) -> dict[Path, str]:
        """What is wrong by damaged manifest, pin or table; of objects only reading tells (`upkeep.examine`)."""
        commits, damaged = self.manifests.scan()
        return {**damaged, **self.damaged_refs(commits)}

    def damaged_refs(self, commits: list[Commit]) -> dict[Path, str]:
        """What is wrong with pins and tables of a store with these commits, by file."""
        damaged = self._pins(commits)[1]
        for name in TABLES:
            try:
                self.refs.table(name)
            except ValueError as error:
                damaged[self.refs.folder / name] = str(error)
        return damaged

    @property
    def repair_command(self) -> str:
        return shlex.join(["stackwise", "ckpt", "repair", str(self.root.parent)])

    def _pins(self, commits: list[Commit]) -> tuple[dict[str, str], dict[Path, str]]:
        pins, damaged = self.refs.pins()
        ids = {commit.id for commit in commits}
        for name, commit in pins.items():
            if commit not in ids and files.size_of(self.quarantine / f"{commit}.json") is None:
                damaged[self.refs.pin_folder / name] = f"it names {commit}, which is no commit of the store"
        return pins, damaged

    def _no_such(self, name: str, commits: list[Commit], found: list[Commit]) -> str:
        if found:
            return f"{name!r} is the beginning of several commits: {', '.join(c.id for c in found)}"
        if not commits:
            return f"{self.root} holds no commit yet"
        hint = did_you_mean(name, [*self.pins(), "latest", "best", *(f"step:{c.step}" for c in commits)])
        known = ", ".join(commit.id for commit in commits[-_SHOWN:])
        more = f" and {len(commits) - _SHOWN} older" if len(commits) > _SHOWN else ""
        return f"no commit of {self.root} is called {name!r}; {hint or f'there are {known}{more}'}"
