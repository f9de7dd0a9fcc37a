"""Stored runs: opening one to use it, and finding the one that a config continues."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.store import Store
from stackwise.config.root import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer, load_tokenizer
from stackwise.model.rack import Rack
from stackwise.model.spectral import plain_tensors
from stackwise.precision.convert import restore_full_precision
from stackwise.tracking.folder import RunFolder, RunFolderError
from stackwise.training import state


@dataclass
class OpenRun:
    """A stored run, ready to be used: the rack of one commit with its tokenizer and config."""

    folder: RunFolder
    config: StackWiseConfig
    rack: Rack
    tokenizer: Tokenizer
    commit: Commit
    meta: dict[str, Any]

    def restore_full_precision(self, uid: str) -> None:
        """Put back the fp32 weights that a stack had before it was stored in another format.

        Stacks trained after that have learned from the rounded outputs. An unknown stack is a ValueError, one whose
        weights were not kept (`checkpoint.full_precision_backup`) a CheckpointError.
        """
        known = [stack.uid for stack in self.rack.stacks]
        if uid not in known:
            raise ValueError(f"no stack is called {uid!r}; known: {', '.join(known)}")
        stack = self.rack.stacks[known.index(uid)]
        if stack.weight_format == "fp32":
            return
        tensors = Store(self.folder.store).load(self.commit, state.full_precision_part(uid))
        prefix = f"stacks.{uid}."
        plain = plain_tensors({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
        restore_full_precision(stack, plain)
        stacks = [s.spec for s in self.rack.stacks]
        self.rack.spec = self.rack.spec.with_stacks(stacks)


def open_run(path: str | Path, *, commit: str | None = None) -> OpenRun:
    """Load a run folder: the newest commit, or the one that `commit` names (see `Store.find`).

    Raises RunFolderError when there is no run, CommitNameError when there is no such commit, CheckpointError when it is
    damaged.
    """
    folder = RunFolder.open(path)
    store = Store(folder.store)
    chosen = store.latest() if commit is None else store.find(commit)
    if chosen is None:
        raise RunFolderError(
            f"{folder.path} has no commit yet; train it first: stackwise train {folder.config}"
        )
    meta = state.read_meta(store, chosen)
    rack = state.load_rack(store, chosen, meta).eval()
    config = StackWiseConfig.from_yaml(folder.config)
    tokenizer = load_tokenizer(
        folder.tokenizer,
        expected=meta.get("tokenizer"),
        hint="put back the file that the run was trained with: with other ids every text means something else",
    )
    return OpenRun(folder, config, rack, tokenizer, chosen, meta)


def open_folder(config: StackWiseConfig) -> tuple[RunFolder, Store, Commit | None]:
    """The run's folder, and the commit to continue from (null: a new run)."""
    settings = config.checkpoint
    path = Path(settings.dir) / config.training.run_id
    if settings.resume not in ("auto", "never"):
        path = Path(settings.resume)
        RunFolder.open(path)
    folder = RunFolder(path)
    if settings.resume == "never" or settings.overwrite or not folder.holds_a_run():
        with ExitStack() as stack:
            if folder.store.exists():
                stack.enter_context(Store(folder.store).lock())  # nobody may be training there
            folder = RunFolder.create(path, overwrite=settings.overwrite)
        return folder, Store(folder.store), None
    store = Store(folder.store)
    commit = store.latest()
    if commit is None and any(store.quarantine.glob("*")):
        raise CheckpointError(
            f"{folder.path} has no whole commit, and damaged ones in {store.quarantine}. Restore their files from a copy, "
            f"then `{store.repair_command}`; or train anew with checkpoint.overwrite=true, which deletes them"
        )
    if commit is None:  # stopped before its first save: nothing to continue, nothing to lose
        with store.lock():  # nobody may be training there
            return RunFolder.create(path, overwrite=True), Store(folder.store), None
    return folder, store, commit
