"""The content-addressed checkpoint store.

    objects/ab/<sha256>              safetensors, named by the hash of their bytes, never changed
    commits/<step>-<hash16>.json     manifests; a commit exists when its manifest does
    refs/                            pins made by hand, scores, the newest commit's id (see `refs`)
    tmp/                             files being written; emptied by the next writer
    quarantine/                      damaged files, moved there by `upkeep.repair`
    LOCK                             who is writing

A commit writes each new object (temporary file, fsync, rename), makes the names durable (fsync of the
folders), and only then writes the manifest in the same way. A crash anywhere leaves the old commits or
also the new one, whole; what it leaves besides is unreferenced and swept by `prune`. Parts that did
not change hash to an object that is already there and cost no write. Every manifest lists every
object, so any commit can be read or deleted alone.

Nothing here pickles, and no tensor leaves the store before its file's hash was checked.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stackwise.checkpoint import files
from stackwise.checkpoint.commits import quarantined
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.lock import WriterLock
from stackwise.checkpoint.manifest import MAX_STEP, Commit, Part, check_meta, serialize
from stackwise.checkpoint.reading import Reader
from stackwise.checkpoint.retention import Retention, kept
from stackwise.storage import ops
from stackwise.storage.header import check_name
from stackwise.storage.tensors import Encoded, check_tensors, decode, encode, same_bits

_WORTH_A_THREAD = 8 * 2**20
"""Bytes of a commit from which hashing beside writing pays."""


@dataclass(frozen=True)
class Pruned:
    """What a prune removed, or would."""

    commits: tuple[str, ...]
    """Ids of the commits."""
    objects: int
    bytes: int
    """Size of the objects together."""
    kept: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, compare=False)
    """Why each of the others is kept, by id."""


class Store(Reader):
    """Commits of one run under the folder `root`. Opening a store neither creates nor locks anything.

    Reading needs no lock. `commit`, `prune`, `pin`, `unpin` and `score` take the writer's lock for the call
    unless `lock()` holds it already; a training run holds it from start to end. Not for use by several threads
    at once.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(Path(root))
        self._lock = WriterLock(self.root / "LOCK")

    # Writing

    def lock(self) -> WriterLock:
        """Become the only writer until the lock is released (it is a context manager).

        Creates the store's folders and removes what an interrupted writer left in tmp/. Raises LockError at
        once when another process is writing.
        """
        files.make_dir(self.root)
        self._lock.acquire()
        try:
            for folder in ("objects", "commits", "refs", "tmp", "quarantine"):
                files.make_dir(self.root / folder)
            # Always, in case the writer that created these folders died before it could.
            files.sync_dir(self.root)
            files.sync_dir(self.root.parent)
            for name in files.names(self.tmp):
                files.remove(self.tmp / name)
        except BaseException:
            self._lock.release()
            raise
        return self._lock

    def commit(
        self,
        parts: Mapping[str, Mapping[str, Tensor]],
        meta: dict[str, Any],
        *,
        step: int,
        pin: str | None = None,
        parent: Commit | None = None,
        carried: Mapping[str, tuple[Commit, str]] | None = None,
        frozen: Mapping[str, str] | None = None,
    ) -> Commit:
        """Store one whole state and return once it is durable.

        `parts` maps names such as `stack:s0/weights` to named tensors; a tensor that two parts share (tied
        weights) is given once. `meta` is JSON: texts, finite numbers, booleans, null, lists, and
        dicts with text keys. `pin` keeps the commit from being pruned until a newer one has the same pin.
        `parent` is the commit this state continues, by default the newest. `carried` maps further names to (commit, part)
        of earlier ones, which are listed again without being read or written. `frozen` maps parts that must not have
        changed to the SHA-256 of their object.

        Raises ValueError for arguments that cannot be stored, LockError, SpaceError, and CheckpointError
        when writing fails. After an error the store holds the commits it held before, and the new one only
        if everything but the last sync was done (a power loss may then still take it).
        """
        self._check_arguments(parts, meta, step, pin)
        carried = carried or {}
        for name in carried:
            check_name(name, "part")
            if name in parts:
                raise ValueError(f"part {name!r} is both given and carried")
        with self.writing():
            existing = self.commits()
            if parent is None and existing:
                parent = existing[-1]
            path: Path | None = None
            fresh: list[Path] = []
            try:
                entries, repaired, written = {}, [], 0
                for name, (commit, part) in carried.items():
                    self.checked(commit, commit.parts[part], self.objects.check_size)
                    entries[name] = dataclasses.replace(commit.parts[part], name=name)
                for name, encoded in _encoded(parts):
                    if frozen and frozen.get(name, encoded.sha256) != encoded.sha256:
                        raise self._thawed(name, encoded, parent)
                    state = self.objects.put(encoded, fresh)
                    written += encoded.size if state != "shared" else 0
                    repaired += [name] if state == "repaired" else []
                    entries[name] = Part(name, encoded.sha256, encoded.size, encoded.tensors)
                self.objects.sync({entry.sha256 for entry in entries.values()})
                ops.crashpoint("objects.durable")
                identity, text = serialize(
                    number=existing[-1].number + 1 if existing else 1,
                    step=step,
                    parent=parent.sha256 if parent else None,
                    pin=pin,
                    bytes_written=written,
                    meta=meta,
                    parts=entries,
                )
                path = self.manifests.path(identity)
                files.write_atomic(path, [text], tmp_dir=self.tmp, kind="manifest")
            except BaseException:
                # Give the disk back what this commit took, unless its manifest already stands.
                with contextlib.suppress(CheckpointError):
                    if path is None or files.size_of(path) is None:
                        self.objects.discard(fresh)
                raise
            files.sync_dir(self.manifests.folder)
            ops.crashpoint("manifest.durable")
            self.refs.write_latest(identity)
            commit, _ = self.read_manifest(path)
            return dataclasses.replace(commit, repaired=tuple(repaired))

    def prune(self, retention: Retention = Retention(), *, dry_run: bool = False) -> Pruned:  # noqa: B008 - frozen
        """Delete all commits that nothing in `retention` keeps, and every object that no commit lists.

        The newest commit, those pinned by hand and the last verified one always stay, and so do objects that a
        manifest in quarantine/ names. `dry_run` deletes nothing and needs no lock.

        Raises CheckpointError, deleting nothing, when a manifest, a pin or (to keep the best) the table of scores is
        damaged: what must stay is unknown then; and when the newest commit is not intact: an older one may be needed.
        """
        with contextlib.nullcontext() if dry_run else self.writing():
            commits, damaged = self.manifests.scan()
            if damaged:
                path = next(iter(damaged))
                raise CheckpointError(
                    f"nothing was pruned: the manifest {path} is damaged ({damaged[path]}), so what it needs is "
                    f"unknown. {self.way_out(commits, list(damaged))}",
                    path=path,
                )
            keep = kept(
                commits,
                retention,
                pins=self.own_pins(commits),
                scores=self.scores() if retention.best else {},
                verified=self.verified(),
            )
            if commits:
                for part in commits[-1].parts.values():
                    self.checked(commits[-1], part, self.objects.verify_once)
            doomed = [commit for commit in commits if commit.id not in keep]
            listed = {
                part.sha256 for commit in commits if commit.id in keep for part in commit.parts.values()
            } | quarantined(self.quarantine)
            if dry_run:
                garbage = self.objects.unlisted(listed)
                return Pruned(
                    tuple(commit.id for commit in doomed), len(garbage), sum(garbage.values()), keep
                )
            if doomed:  # refs/latest may name one of them: a name that is not synced may be the old one again
                if self.refs.latest() != commits[-1].id:
                    self.refs.write_latest(commits[-1].id)
                files.sync_dir(self.refs.folder)
            # Manifests first, durably: at no time does a manifest list an object that may be gone.
            for commit in doomed:
                files.remove(commit.path)
                ops.crashpoint("prune.manifest")
            files.sync_dir(self.manifests.folder)
            ops.crashpoint("prune.manifests-durable")
            count, size = self.objects.sweep(listed)
            return Pruned(tuple(commit.id for commit in doomed), count, size, keep)

    # How

    def _check_arguments(
        self, parts: Mapping[str, Mapping[str, Tensor]], meta: dict[str, Any], step: int, pin: str | None
    ) -> None:
        if not isinstance(step, int) or not 0 <= step <= MAX_STEP:
            raise ValueError(f"step: got {step!r}, allowed: 0 to {MAX_STEP}")
        if pin is not None:
            check_name(pin, "pin")
        check_meta(meta)
        seen: dict[tuple[str, int], str] = {}
        for part, tensors in parts.items():
            check_name(part, "part")
            with _about(part):
                check_tensors(tensors)
            for name, tensor in tensors.items():
                place = (str(tensor.device), tensor.data_ptr())
                if tensor.numel() and seen.setdefault(place, f"{part}: {name}") != f"{part}: {name}":
                    raise ValueError(
                        f"{seen[place]} and {part}: {name} are the same memory; give tied tensors once"
                    )

    def _thawed(self, part: str, encoded: Encoded, parent: Commit | None) -> CheckpointError:
        known = None if parent is None else parent.parts.get(part)
        changed = ""
        if parent is not None and known is not None:
            with contextlib.suppress(CheckpointError, ValueError):
                before, now = self.load(parent, part), decode(bytearray(b"".join(encoded.chunks)))
                names = [n for n in now if n not in before or not same_bits(now[n], before[n])]
                changed = f" ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        return CheckpointError(
            f"part {part!r} is frozen, yet its bytes changed{changed} since the stage began, so this state was not saved. "
            "The commits already in the store are intact. Something trains or overwrites what should rest: an optimizer "
            "of your own, a hook, or damaged memory. Run the same command again to go on from the last commit.",
            path=self.root,
            part=part,
        )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writer's lock inside the block, as if by `lock()` where this store does not hold it yet."""
        if self._lock.held:
            yield
        else:
            with self.lock():
                yield


@contextlib.contextmanager
def _about(part: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"part {part!r}: {error}") from error


def _encoded(parts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Encoded]]:
    """Names in order with the parts' bytes; the next part is hashed by a thread while the caller writes this one."""
    if len(parts) < 2 or sum(t.nbytes for held in parts.values() for t in held.values()) < _WORTH_A_THREAD:
        yield from ((name, encode(parts[name])) for name in sorted(parts))
        return
    with ThreadPoolExecutor(1, "stackwise-hash") as thread:
        names = sorted(parts)
        ahead = thread.submit(encode, parts[names[0]])
        for name, following in itertools.zip_longest(names, names[1:]):
            encoded = ahead.result()
            if following is not None:
                ahead = thread.submit(encode, parts[following])
            yield name, encoded
