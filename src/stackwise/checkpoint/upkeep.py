"""Looking after a store: reading everything once, counting bytes, setting damage aside."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stackwise.checkpoint import files
from stackwise.checkpoint.commits import quarantined
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import FILE_NAME, Commit, Part
from stackwise.checkpoint.store import Store
from stackwise.storage import ops


@dataclass(frozen=True)
class Damage:
    """One file that is not what it was, and what depends on it."""

    path: Path
    what: str
    parts: tuple[str, ...] = ()
    """Parts of commits that an object is; none for other files."""
    commits: tuple[str, ...] = ()
    """Ids of the commits hurt."""


@dataclass(frozen=True)
class Examined:
    """What reading a store has shown."""

    objects: int
    bytes: int
    """Objects that were read, and their bytes."""
    whole: tuple[str, ...]
    """Ids of the commits of which every object was read and is whole."""
    damage: tuple[Damage, ...]


def examine(store: Store, commits: Sequence[Commit] | None = None, *, share: float = 1.0) -> Examined:
    """Hash the objects of some commits (null: of all), each once, and look at manifests, pins and tables.

    `share` below 1 reads that share of the objects, drawn at random, so that checks of a large store can be spread
    over many calls. Needs no lock; a commit that is pruned meanwhile is passed over.
    """
    everything, manifests = store.manifests.scan()
    chosen = list(everything if commits is None else commits)
    parts = {part.sha256: part for commit in chosen for part in commit.parts.values()}
    hashes = sorted(parts)
    if share < 1:
        hashes = random.SystemRandom().sample(hashes, max(1, round(share * len(hashes)))) if hashes else []
    damage, size = {}, 0
    for sha256 in hashes:
        try:
            size += len(store.objects.read(parts[sha256]))
        except (ValueError, CheckpointError) as error:
            damage[sha256] = str(error)
    # What was pruned while this was reading is no damage.
    there = [commit for commit in chosen if files.size_of(commit.path) is not None]
    hurt = {part.sha256 for commit in there for part in commit.parts.values()} & damage.keys()
    unread = set(parts) - set(hashes)
    whole = [
        commit.id
        for commit in there
        if not {part.sha256 for part in commit.parts.values()} & (unread | damage.keys())
    ]
    found = [_damage_of(store, everything, parts[sha256], damage[sha256]) for sha256 in sorted(hurt)]
    found += [Damage(path, what, commits=(path.stem,)) for path, what in manifests.items()]
    found += [Damage(path, what) for path, what in store.damaged_refs(everything).items()]
    return Examined(len(hashes), size, tuple(whole), tuple(found))


def _damage_of(store: Store, commits: Iterable[Commit], part: Part, what: str) -> Damage:
    listing = [(c, p) for c in commits for p in c.parts.values() if p.sha256 == part.sha256]
    names = tuple(dict.fromkeys(p.name for _, p in listing))
    return Damage(
        store.objects.path(part.sha256), what, names, tuple(dict.fromkeys(c.id for c, _ in listing))
    )


@dataclass(frozen=True)
class Usage:
    """Bytes of a store. `parts`: of distinct objects by part, summed over all commits. `new`, `unique`: by commit,
    what it added when it was written, and what deleting it alone would free."""

    parts: dict[str, int]
    new: dict[str, int]
    unique: dict[str, int]
    objects: int
    manifests: int
    unreferenced: int
    """Objects that no commit lists: the next prune removes them."""
    held: int
    """Objects that only a manifest in quarantine lists: prune leaves them."""
    quarantine: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(
            (self.objects, self.manifests, self.unreferenced, self.held, self.quarantine, self.temporary)
        )


def usage(store: Store) -> Usage:
    """Count a store. An object that several parts share counts for the first of them by name."""
    commits, _ = store.manifests.scan()
    users: dict[str, set[str]] = {}
    owner: dict[str, tuple[str, int]] = {}
    for commit in commits:
        for name in sorted(commit.parts):
            part = commit.parts[name]
            users.setdefault(part.sha256, set()).add(commit.id)
            known = owner.setdefault(part.sha256, (name, part.bytes))
            owner[part.sha256] = min(known, (name, part.bytes))
    by_part: dict[str, int] = {}
    for name, size in owner.values():
        by_part[name] = by_part.get(name, 0) + size
    alone: dict[str, int] = {commit.id: 0 for commit in commits}
    for sha256, ids in users.items():
        if len(ids) == 1:
            alone[next(iter(ids))] += owner[sha256][1]
    garbage = store.objects.unlisted(set(users))
    held = quarantined(store.quarantine)
    return Usage(
        parts=dict(sorted(by_part.items())),
        new={commit.id: commit.bytes_written for commit in commits},
        unique=alone,
        objects=sum(size for _, size in owner.values()),
        manifests=_size_in(store.manifests.folder),
        unreferenced=sum(size for path, size in garbage.items() if path.name not in held),
        held=sum(size for path, size in garbage.items() if path.name in held),
        quarantine=_size_in(store.quarantine),
        temporary=_size_in(store.tmp),
    )


def _size_in(folder: Path) -> int:
    return sum(files.size_of(folder / name) or 0 for name in files.names(folder))


@dataclass(frozen=True)
class Repaired:
    """What `repair` did."""

    moved: tuple[Damage, ...]
    """Damaged files, now in quarantine/."""
    restored: tuple[str, ...]
    """Ids of commits that came back from quarantine/, for all their files are whole again."""
    whole: tuple[str, ...]
    """Ids of the commits that are there now, every object read; oldest first."""
    lost: tuple[str, ...]
    """Ids of the commits in quarantine/."""


def repair(store: Store, scores: dict[str, float] | None = None) -> Repaired:
    """Set damage aside, take back what is whole again, and make refs anew. Deletes nothing, edits no object.

    A damaged object goes to quarantine/ with the manifests of all commits that it hurts, a damaged manifest or pin
    alone. What a manifest in quarantine/ lists stays in the store: put the missing file back from a copy and
    repair again. `scores`: validation loss by commit, for a table that is damaged or missing.

    Raises LockError while another process writes.
    """
    with store.lock():
        restored = _take_back(store)
        found = examine(store)
        for damage in found.damage:
            _set_aside(store, damage.path)
            for commit in damage.commits:
                _set_aside(store, store.manifests.path(commit))
        commits, _ = store.manifests.scan()
        ids = {commit.id for commit in commits}
        if commits:
            store.refs.write_latest(commits[-1].id)
        if scores:
            known = _table_or_empty(store, "scores")
            table = {name: loss for name, loss in {**scores, **known}.items() if name in ids}
            store.refs.write_table("scores", table)
        remember(store, found.whole)
        lost = [n.removesuffix(".json") for n in files.names(store.quarantine) if FILE_NAME.fullmatch(n)]
        return Repaired(found.damage, restored, tuple(c.id for c in commits), tuple(lost))


def remember(store: Store, whole: Iterable[str]) -> None:
    """Note that these commits were found whole just now. The caller holds the lock."""
    there = {commit.id for commit in store.commits()}
    table = {**store.verified(), **dict.fromkeys(whole, float(round(time.time())))}
    store.refs.write_table("verified", {name: when for name, when in table.items() if name in there})


def _table_or_empty(store: Store, name: str) -> dict[str, float]:
    try:
        return store.refs.table(name)
    except ValueError:
        return {}


def _take_back(store: Store) -> tuple[str, ...]:
    """Move manifests out of quarantine/ whose commits are whole, objects included; their ids."""
    restored = []
    for name in files.names(store.quarantine):
        source, target = store.quarantine / name, store.manifests.folder / name
        if not FILE_NAME.fullmatch(name) or files.size_of(target) is not None:
            continue
        try:
            commit, _ = store.manifests.read(source)
            for part in commit.parts.values():
                store.objects.verify_once(part)
        except (ValueError, CheckpointError):
            continue
        files.move(source, target)
        restored.append(commit.id)
    return tuple(restored)


def _set_aside(store: Store, path: Path) -> None:
    """Move a file to quarantine/ under a name that is free there; nothing happens where it is gone."""
    if not path.is_symlink() and not path.exists():
        return
    target, number = store.quarantine / path.name, 1
    while target.is_symlink() or target.exists():
        number += 1
        target = store.quarantine / f"{path.name}.{number}"
    files.move(path, target)
    ops.crashpoint("repair.moved")
