"""Where a run keeps its state: the commits of its store, written beside the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.saver import Saved, Saver
from stackwise.checkpoint.settings import CheckpointSettings
from stackwise.checkpoint.store import Store
from stackwise.training import state

if TYPE_CHECKING:
    from stackwise.training.loop import Engine

_COPY_ON_CPU = 256 * 2**20


class RunKeeper:
    """Saves an engine's state into a store (`training.hooks.Keeper`).

    `facts` gives what the manifest holds besides the engine's own state: hashes, and how long the metrics file is.
    `before` runs ahead of every commit: what the facts refer to must be on the disk by then.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        store: Store,
        facts: Callable[[], dict[str, Any]],
        *,
        before: Callable[[], object] = lambda: None,
        retention: Retention | None = None,
    ) -> None:
        self.settings, self.store, self.facts, self.before = settings, store, facts, before
        self.retention = retention or Retention.of(settings)
        self.saver = Saver(store, asynchronous=settings.asynchronous is not False)
        self.failures = 0
        """Saves that could not be written, in this process."""

    def begin(self, engine: Engine) -> None:
        """Take the hashes of what rests in this stage; every commit compares."""
        if self.settings.asynchronous == "auto":
            self.drain()
            self.saver.asynchronous = copies(self.settings, engine.device.type, _copied_bytes(engine))
        still = state.still_parts(engine)
        self.saver.watch({name: t for name, t in state.parts_of(engine).items() if name in still})

    def save(self, engine: Engine, pin: str | None, since: float) -> None:
        """Begin to make the state durable; the training stands still since `since` (`time.perf_counter`)."""
        spec, keeps = engine.rack.spec, self.settings.full_precision_backup

        def carried(latest: Commit | None) -> dict[str, tuple[Commit, str]]:
            return state.full_precision_parts(spec, latest) if keeps else {}

        self.saver.save(
            state.parts_of(engine),
            state.meta_of(engine, self.facts()),
            step=engine.progress.step,
            pin=pin,
            still=state.still_parts(engine),
            fixed=state.fixed_tensors(engine),
            carried=carried,
            before=self.before,
            after=lambda store: store.prune(self.retention),
            note={"stage": engine.progress.stage},
            since=since,
        )

    def scored(self, step: int, loss: float) -> None:
        """Note the validation loss of a step's commit, as soon as that is there."""
        self.saver.then(lambda: self.store.score(step, loss))

    def events(self) -> list[dict[str, Any]]:
        """A `checkpoint` event for each commit that is durable by now; a failed save raises, or is noted."""
        return [self._event(saved) for saved in self.saver.finished()]

    def drain(self) -> None:
        """Wait until everything is on the disk."""
        self.saver.drain()

    def close(self) -> None:
        """Wait, and end the thread."""
        self.saver.close()

    def _event(self, saved: Saved) -> dict[str, Any]:
        if saved.error is not None:
            warns = self.settings.on_save_error == "warn" and isinstance(saved.error, CheckpointError)
            if not warns:
                raise saved.error
            self.failures += 1
            what = f"step {saved.step}" if saved.step >= 0 else "a score"
            message = f"{what} could not be saved ({self.failures} so far): {saved.error}"
            return {"event": "note", "message": message}
        commit = saved.commit
        assert commit is not None
        return {
            "event": "checkpoint",
            "step": saved.step,
            **saved.note,
            "commit": commit.id,
            "bytes_written": commit.bytes_written,
            "bytes_total": sum(part.bytes for part in commit.parts.values()),
            "seconds": saved.seconds,
            "blocked_seconds": saved.blocked_seconds,
        }


def copies(settings: CheckpointSettings, device_kind: str, size: int) -> bool:
    """Whether saves copy the `size` bytes of what trains, to write them beside the training."""
    if settings.asynchronous == "auto":
        return device_kind != "cpu" or size <= _COPY_ON_CPU
    return settings.asynchronous


def _copied_bytes(engine: Engine) -> int:
    """Bytes of what changes in this stage: weights and moments that train."""
    trained = sum(p.nbytes for p in engine.rack.parameters() if p.requires_grad)
    moments = 2 * sum(p.numel() * torch.float32.itemsize for p in engine.rack.parameters() if p.requires_grad)
    return trained + moments
