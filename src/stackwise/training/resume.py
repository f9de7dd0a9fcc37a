"""From a commit back to a running engine. Every piece of state is put back by one function of its own.

    weights       `state.load_rack`            moments      `Engine.restore`, which calls `Optimizers.load`
    stages        `state.stages_of`            loss scale   `restore_scale`
    counters, spike window                     `state.progress_of`
    place in the data                          `restore_position`
    metrics.jsonl                              `restore_metrics`

What is drawn at random depends on the seed and on these counters alone, so there is no generator to put back.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypedDict

import torch

from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.stage import Stage
from stackwise.data.errors import DataError
from stackwise.data.loader import TokenLoader
from stackwise.objectives.base import Objective
from stackwise.tracking.metrics import MetricsFile
from stackwise.training import state
from stackwise.training.errors import GoBack, IncompatibleResumeError
from stackwise.training.guard import RECENT, ROLLBACKS
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine
from stackwise.training.progress import Progress


class Where(TypedDict):
    """What an engine needs besides the run itself."""

    device: torch.device
    dtype: torch.dtype
    hooks: Hooks
    identity: dict[str, str]
    objective: Objective


def restore(
    config: StackWiseConfig,
    loader: TokenLoader,
    store: Store,
    commit: Commit,
    metrics: MetricsFile,
    where: Where,
) -> Engine:
    """The engine as it was when the commit was made. A run that cannot go on: IncompatibleResumeError."""
    meta = state.read_meta(store, commit)
    if "imported" in meta:
        raise IncompatibleResumeError(
            f"{store.root.parent} is an imported model, which has no training to go on with; give the run that starts "
            "from it a training.run_id of its own"
        )
    stages, progress = state.stages_of(meta), state.progress_of(meta)
    restore_position(loader, stages, progress, meta)
    restore_metrics(metrics, meta)
    rack = state.load_rack(store, commit, meta)
    engine = Engine(config, rack, stages, loader, progress=progress, **where)
    engine.restore(state.load_optimizer_state(store, commit))
    restore_scale(engine, meta)
    return engine


def restore_position(
    loader: TokenLoader, stages: list[Stage], progress: Progress, meta: dict[str, Any]
) -> None:
    """The next batch is the one that came after the commit."""
    try:
        if progress.begun:
            stage = stages[progress.stage]
            loader.reshape(stage.seq_len, stage.batch_size)
        else:
            loader.reshape(None, None)
        loader.load_state_dict(meta["loader"])
    except DataError as error:
        raise IncompatibleResumeError(str(error)) from None


def restore_metrics(metrics: MetricsFile, meta: dict[str, Any]) -> None:
    """What was logged after the commit will be logged again."""
    metrics.cut_at(meta["metrics_bytes"])


def restore_scale(engine: Engine, meta: dict[str, Any]) -> None:
    """The scale of losses in float16; null where the run has had none."""
    if meta["scaler"]:
        engine.scaler.load_state_dict(meta["scaler"])
        engine.has_scaled = True


def go_back(engine: Engine, wish: GoBack, store: Store, metrics: MetricsFile, where: Where) -> Engine:
    """Go on from an earlier commit of this stage, or of the end of the stage before, behind the data seen since.

    The commit is the newest that is `wish.steps` steps old, or else the oldest there is. What it holds is saved again
    at once, so that a run which dies now goes on from here as well. Without such a commit: NumericError.
    """
    p = engine.progress
    commit = _target(store, p, p.step - wish.steps)
    if commit is None:
        raise engine.numeric_error(f"{wish}, and there is no commit of this stage to go back to", wish.facts)
    newest = store.commits()[-1].number
    assert isinstance(engine.loader, TokenLoader)
    engine.drop()
    again = restore(engine.config, engine.loader, store, commit, metrics, where)
    q = again.progress
    abandoned = [commit.number + 1, newest] if newest > commit.number else []
    q.guard.went_back(p.step, p.guard, abandoned)
    if (q.stage, q.begun) == (p.stage, True):
        again.loader.skip(p.stage_batches - q.stage_batches)
        q.stage_batches = p.stage_batches
        q.guard.leap = p.guard.leap
    else:
        q.guard.leap = [p.stage, p.stage_batches]
    again.hooks.emit(
        {
            "event": "note",
            "message": f"{wish}. Went back to the commit of step {commit.step}, and skip the data seen since "
            f"({len(q.guard.rollbacks)} of at most {ROLLBACKS} times in {RECENT:,} steps)",
        }
    )
    again.save_again()
    return again


def retention_of(config: StackWiseConfig) -> Retention:
    """The commits that pruning leaves, at least as many of the newest as going back from a spike reaches over."""
    asked, training = Retention.of(config.checkpoint), config.training
    if training.spike_policy != "rollback":
        return asked
    # Besides the one it goes back to and the newest: a stop by signal saves between the others.
    needed = math.ceil(training.rollback_steps / config.checkpoint.save_interval) + 3
    return replace(asked, last=max(asked.last, needed))


def _target(store: Store, now: Progress, latest_step: int) -> Commit | None:
    """The newest commit of at most `latest_step` that this stage came from, else the oldest; null: none."""
    chosen: Commit | None = None
    for commit in reversed(store.commits()):
        if any(first <= commit.number <= last for first, last in now.guard.abandoned):
            continue
        meta = state.read_meta(store, commit)
        then = state.progress_of(meta)
        at_end = then.stage == now.stage - 1 and then.stage_step == state.stages_of(meta)[then.stage].steps
        if then.stage != now.stage and not at_end:
            break
        chosen = commit
        if commit.step <= latest_step or at_end:
            break
    return chosen
