"""Saving beside the training: the state is copied at a step's end, hashed and written by a thread.

One save is in flight at most; the next waits for it. What goes wrong in the thread is raised to the training at its
next look (`finished`), never swallowed. The thread is the only one that touches the store from `start` to `close`.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stackwise.checkpoint.errors import CheckpointError, SpaceError
from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.store import Store
from stackwise.storage.tensors import encode

Parts = Mapping[str, Mapping[str, Tensor]]
Carried = Mapping[str, tuple[Commit, str]]

TIMEOUT = 600.0
"""Seconds after which a save that does not end is an error."""


@dataclass(frozen=True)
class Saved:
    """A save that ended: a durable commit, or what prevented it."""

    step: int
    note: dict[str, Any]
    """What the caller gave along."""
    commit: Commit | None
    error: Exception | None
    seconds: float
    """From when the training stood still to the durable commit."""
    blocked_seconds: float
    """How much of them the training stood still."""


@dataclass
class _Job:
    work: Callable[[], object]
    step: int | None = None
    note: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    blocked: float = 0.0


class Saver:
    """Commits to a store from a thread; `asynchronous` False: at once, in the caller's thread, without a copy."""

    def __init__(self, store: Store, *, asynchronous: bool = True) -> None:
        self.store, self.asynchronous = store, asynchronous
        self.durable_step: int | None = None
        """Step of the newest commit that is on the disk, among those of this saver."""
        self._frozen: dict[str, str] = {}
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Saved] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._pending, self._counting = 0, threading.Lock()
        self._thread: threading.Thread | None = None

    # --- for the training's thread -----------------------------------------------------------------------------

    def watch(self, parts: Parts) -> None:
        """From now on these parts are frozen: a save in which one has other bytes than now fails.

        Waits for the save in flight. The hashes are taken by the thread; the tensors must not change, which is what
        this is about.
        """
        self.drain()

        def work() -> None:
            self._frozen = {name: encode(tensors).sha256 for name, tensors in parts.items()}

        self._submit(_Job(work))

    def save(
        self,
        parts: Parts,
        meta: dict[str, Any],
        *,
        step: int,
        pin: str | None = None,
        still: Set[str] = frozenset(),
        fixed: Set[str] = frozenset(),
        carried: Callable[[Commit | None], Carried] = lambda latest: {},
        before: Callable[[], object] = lambda: None,
        after: Callable[[Store], object] = lambda store: None,
        note: dict[str, Any] | None = None,
        since: float | None = None,
    ) -> None:
        """Begin to make a state durable; `finished` tells when it is.

        Returns once everything may change again but the parts that are `still` and the tensors, by name, that are `fixed`. `carried` is asked with the newest
        commit for parts to list again (see `Store.commit`), `before` runs ahead of the commit and `after` behind it. `note` comes back with the
        result. `since`: when, by `time.perf_counter`, the caller began to stand still for it; null: now. Raises SpaceError before anything is copied where the disk has no room for what changes.
        """
        started = time.perf_counter() if since is None else since
        self.drain()
        moving = {
            part: {name: t for name, t in tensors.items() if name not in fixed}
            for part, tensors in parts.items()
            if part not in still
        }
        self._require_room(sum(t.nbytes for tensors in moving.values() for t in tensors.values()), step)
        if self.asynchronous:
            copies = {name: self._copied(name, tensors) for name, tensors in moving.items()}
            self._forget_buffers(copies)
            parts = {part: {**tensors, **copies.get(part, {})} for part, tensors in parts.items()}

        def work() -> Commit:
            store = self.store
            before()
            commit = store.commit(
                parts, meta, step=step, pin=pin, carried=carried(store.latest()), frozen=self._frozen
            )
            after(store)
            return commit

        blocked = time.perf_counter() - started
        self._submit(_Job(work, step, note or {}, started, blocked))

    def then(self, action: Callable[[], object]) -> None:
        """Run something on the store behind the save in flight."""
        self._submit(_Job(action))

    def finished(self) -> list[Saved]:
        """Saves that ended since the last call, oldest first, failed ones among them."""
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        return found

    def drain(self) -> None:
        """Wait until nothing is in flight. Raises CheckpointError after ten minutes without an end."""
        if not self._idle.wait(TIMEOUT):
            raise CheckpointError(
                f"the save to {self.store.root} has not ended for {TIMEOUT:.0f} seconds: its disk hangs. The commits "
                "already in the store are intact; once the disk answers, run the same command again: it resumes.",
                path=self.store.root,
            )

    def close(self) -> None:
        """Wait for what is in flight and end the thread. What it found is still to be asked for."""
        try:
            self.drain()
        finally:
            self._jobs.put(None)
            self._buffers.clear()
        # It frees the tensors of its last job as it ends; a thread inside torch while Python shuts down aborts the process.
        if self._thread is not None:
            self._thread.join(TIMEOUT)
            self._thread = None

    # --- how -----------------------------------------------------------------------------------------------------

    def _submit(self, job: _Job) -> None:
        if not self.asynchronous:
            self._perform(job)
            return
        if self._thread is None:
            # A daemon, so that a disk that hangs cannot keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="stackwise-saver", daemon=True)
            self._thread.start()
        with self._counting:
            self._pending += 1
            self._idle.clear()
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._perform(job)
            with self._counting:
                self._pending -= 1
                if not self._pending:
                    self._idle.set()

    def _perform(self, job: _Job) -> None:
        result: object = None
        failure: Exception | None = None
        try:
            result = job.work()
        except Exception as error:  # noqa: BLE001 - handed to the training's thread
            failure = error
        if job.step is None and failure is None:
            return
        seconds = time.perf_counter() - job.started if job.step is not None else 0.0
        blocked = job.blocked if self.asynchronous else seconds
        if failure is None:
            self.durable_step = job.step
        step = -1 if job.step is None else job.step
        commit = result if isinstance(result, Commit) else None
        self._done.put(Saved(step, job.note, commit, failure, seconds, blocked))

    def _copied(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            key = (part, name)
            held = self._buffers.get(key)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = self._buffers[key] = tensor.detach().to("cpu", copy=True)
            else:
                held.copy_(tensor.detach())
            copies[name] = held
        return copies

    def _forget_buffers(self, copies: Parts) -> None:
        wanted = {(part, name) for part, tensors in copies.items() for name in tensors}
        for key in self._buffers.keys() - wanted:
            del self._buffers[key]

    def _require_room(self, need: int, step: int) -> None:
        try:
            free = shutil.disk_usage(self.store.root).free
        except OSError:
            return  # writing will tell
        if free < need:
            raise SpaceError(
                f"no space for the commit of step {step} in {self.store.root}: need {need:,} bytes, have {free:,} bytes on "
                "the disk. The commits already in the store are intact. Make room, or set checkpoint.keep_last lower, "
                "then run the same command again: it resumes.",
                path=self.store.root,
            )
