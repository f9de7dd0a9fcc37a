"""Commits as runs of their own: a fork, a folder to hand around, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import MAX_BYTES, Commit
from stackwise.checkpoint.store import Store
from stackwise.checkpoint.transfer import file_of, manifest_of, read_file, share, take, write_folder
from stackwise.config.document import dump
from stackwise.config.errors import ConfigError, Problem
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.assemble import build_rack
from stackwise.data.tokenizers import load_tokenizer
from stackwise.model.spec import RackSpec
from stackwise.storage import ops
from stackwise.storage.sums import check_sums
from stackwise.tracking.folder import RunFolder, RunFolderError
from stackwise.training import state
from stackwise.training.changes import changes_between, course_of

PIN = "forked"
_SMALL = 64 * 2**20


def fork(source: RunFolder, commit: Commit, target: Path, overrides: Sequence[str] = ()) -> RunFolder:
    """A run of its own that goes on from a commit, with the log up to there. Its store holds that commit alone.

    `overrides` may change keys of the classes schedule and free (`config.resume_classes`); the changes take effect when it
    is trained. The objects are second names of the same files where the file system can do that.

    Raises ConfigError for another key, RunFolderError where `target` exists or there is nothing to train, CheckpointError
    for a damaged commit.
    """
    _must_be_free(target)
    store = Store(source.store)
    meta = state.read_meta(store, commit)
    if "imported" in meta:
        raise RunFolderError(
            f"{source.path} is an imported model, which has no training to go on with: "
            f"stackwise train {source.config} training.run_id=NAME starts a run from it"
        )
    before = StackWiseConfig.from_yaml(source.config)
    config = StackWiseConfig.from_yaml(source.config, overrides)
    course = meta.get("config") or course_of(before)
    changed = changes_between(course, course_of(config))
    problems = [
        Problem(
            change.key,
            "says what is trained, which a fork goes on with",
            change.new,
            hint=f"checkpoint.init_from={source.path} starts another run from its weights",
        )
        for change in changed
        if change.kind == "identity"
    ]
    if problems:
        raise ConfigError(problems)
    origin = {"run": str(source.path), "run_id": before.training.run_id, "commit": commit.id}
    allow = [change.key for change in changed]
    meta = {**meta, "config": course, "forked": {**origin, "sha256": commit.sha256, "allow": allow}}
    with ops.appearing(target) as part:
        folder = RunFolder(part)
        log = source.metrics.read_bytes()[: meta["metrics_bytes"]] if source.metrics.is_file() else b""
        _write(folder, config, target, source.tokenizer.read_bytes(), log)
        new = Store(folder.store)
        with new.lock():
            share(store, commit, new)
            carried = {name: (commit, name) for name in commit.parts}
            new.commit({}, meta, step=commit.step, pin=PIN, parent=commit, carried=carried)
    return RunFolder(target)


def export_commit(source: RunFolder, commit: Commit, target: Path) -> None:
    """Write a commit as a folder of plain files (`checkpoint.transfer`), with the configuration, the tokenizer and the
    log of its run. RunFolderError where `target` exists, CheckpointError for a damaged commit."""
    _must_be_free(target)
    store = Store(source.store)
    size = state.read_meta(store, commit)["metrics_bytes"]
    extra = {path.name: path.read_bytes() for path in (source.config, source.tokenizer)}
    extra[source.metrics.name] = source.metrics.read_bytes()[:size] if source.metrics.is_file() else b""
    with ops.appearing(target) as part:
        write_folder(store, commit, part, extra)


def import_commit(source: Path, target: Path) -> tuple[RunFolder, Commit]:
    """A run folder with one commit, that of an exported folder, bit for bit; it can be used and trained on.

    Everything is checked before anything is used: hashes, headers, the tokenizer in a process of its own, and the
    tensors against the rack that the manifest describes. Raises CheckpointError and DamagedFileError where the folder
    is not whole, UnsafeInputError for what must not be loaded, RunFolderError where `target` exists.
    """
    _must_be_free(target)
    manifest = manifest_of(source if source.is_dir() else source.parent)
    given = RunFolder(manifest.parent)
    check_sums(given.path, [manifest.name, given.config.name, given.tokenizer.name, given.metrics.name])
    with ops.appearing(target) as part:
        folder = RunFolder(part)
        store = Store(folder.store)
        text = bytes(read_file(manifest, MAX_BYTES))
        commit = take(
            store, manifest.name, text, lambda entry: read_file(given.path / file_of(entry.name), entry.bytes)
        )
        meta = state.read_meta(store, commit)
        _check_tensors(commit, meta)
        config = StackWiseConfig.from_yaml(given.config)
        tokenizer = bytes(read_file(given.tokenizer, _SMALL))
        _write(folder, config, target, tokenizer, bytes(read_file(given.metrics, meta["metrics_bytes"])))
        load_tokenizer(
            folder.tokenizer,
            foreign=True,
            expected=meta.get("tokenizer"),
            hint="export the commit again, with the run's own tokenizer.json",
        )
    folder = RunFolder(target)
    return folder, Store(folder.store).find(commit.id)


def _must_be_free(target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise RunFolderError(f"{target} exists already; choose another name")


def _write(folder: RunFolder, config: StackWiseConfig, target: Path, tokenizer: bytes, log: bytes) -> None:
    """The files besides the store. The configuration names the place where the run will be."""
    config = config.model_copy(deep=True)
    old, checkpoint = Path(config.checkpoint.dir), config.checkpoint
    if config.data.cache_dir is not None and Path(config.data.cache_dir).parent == old:
        config.data.cache_dir = str(target.parent / Path(config.data.cache_dir).name)
    config.training.run_id, checkpoint.dir = target.name, str(target.parent)
    checkpoint.resume, checkpoint.overwrite = "auto", False
    folder.write_config(dump(config.to_dict()))
    folder.write_environment()
    ops.write_atomic(folder.tokenizer, [tokenizer], kind="text")
    ops.write_atomic(folder.metrics, [log], kind="text")


def _check_tensors(commit: Commit, meta: dict[str, Any]) -> None:
    """The weights are those of the rack that the manifest describes, as far as names, shapes and dtypes tell."""
    try:
        with torch.device("meta"):
            parts = build_rack(RackSpec.from_dict(meta["rack"])).parts()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{commit.id} describes no rack that this version knows: {error}") from error
    for name, tensors in parts.items():
        stored = commit.parts.get(f"{name}/weights")
        listed = {} if stored is None else {info.name: info.shape for info in stored.tensors}
        if listed != {key: tuple(tensor.shape) for key, tensor in tensors.items()}:
            raise CheckpointError(
                f"{commit.id} does not fit its own description: part {name}/weights has other tensors than its rack",
                part=f"{name}/weights",
            )
