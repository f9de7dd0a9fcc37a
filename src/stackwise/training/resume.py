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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch

from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.config.errors import show
from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.stage import Stage
from stackwise.data.errors import DataError
from stackwise.data.loader import TokenLoader
from stackwise.model.spec import RackSpec
from stackwise.objectives.base import Objective
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import MetricsFile
from stackwise.training import state
from stackwise.training.changes import (
    Change,
    approve,
    changes_between,
    continued_stages,
    course_of,
    following,
)
from stackwise.training.errors import GoBack, IncompatibleResumeError
from stackwise.training.guard import RECENT, ROLLBACKS
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine
from stackwise.training.progress import Progress
from stackwise.training.surroundings import differences


class Where(TypedDict):
    """What an engine needs besides the run itself."""

    device: torch.device
    dtype: torch.dtype
    hooks: Hooks
    identity: dict[str, str]
    objective: Objective


def approved(
    config: StackWiseConfig,
    resolved: StackWiseConfig,
    folder: RunFolder,
    meta: dict[str, Any],
    allow: list[str],
    **vocabulary: Any,
) -> list[Change]:
    """The changes of settings with which a run goes on; IncompatibleResumeError unless all are allowed.

    Those that a fork was made with (`copies.fork`) are.
    """
    allow = [*allow, *meta.get("forked", {}).get("allow", ())]
    changes = changes_between(_course(meta, folder), course_of(resolved))
    if not changes:
        return []
    unset = {value.key for value in resolve(config, **vocabulary)[1]}
    given = [change.key for change in changes if change.kind == "schedule" and change.key not in unset]
    follows, would = (following(config, changes, keys, **vocabulary) for keys in (allow, given))
    return approve(changes, allow, folder.path, follows, would)


def _course(meta: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The settings that a commit was made with; older commits do not have them, and their run's are taken."""
    course: dict[str, Any] | None = meta.get("config")
    return course_of(StackWiseConfig.from_yaml(folder.config)) if course is None else course


def not_exact(meta: dict[str, Any], here: dict[str, Any], changes: list[Change]) -> str | None:
    """Why the run will not have the bits of an uninterrupted one; null where it will."""
    there = meta.get("environment")
    reasons = ["the commit does not say where it was made"] if there is None else differences(there, here)
    reasons += [f"{c.key} {show(c.old)} -> {show(c.new)}" for c in changes]
    reasons += _partly_stored(meta, here["dtype"])
    return f"resume is not bit-exact: {', '.join(reasons)}" if reasons else None


def _partly_stored(meta: dict[str, Any], dtype: str) -> list[str]:
    """Stored outputs of the trunk that are lost with the process are computed again, with other rows beside them.

    In fp32 a row comes out the same whatever it is computed with; of narrower products, and of experts, which multiply
    few or many rows as they are chosen, the last bit may differ.
    """
    if not meta["progress"]["stores"]:
        return []
    stacks = RackSpec.from_dict(meta["rack"]).stacks
    narrow = {stack.compute_dtype or dtype for stack in stacks} - {"float32"}
    shown = [f"{name} products" for name in sorted(narrow)]
    shown += ["experts"] if any(block.experts for stack in stacks for block in stack.blocks) else []
    return [
        f"stored outputs of the trunk are computed again in other batches, which shows in the last bit with {what} "
        "(training.progressive.cache_activations)"
        for what in shown
    ]


def restore(
    config: StackWiseConfig,
    loader: TokenLoader,
    store: Store,
    commit: Commit,
    metrics: MetricsFile,
    where: Where,
    fresh: list[Stage],
    changes: bool = False,
) -> Engine:
    """The engine as it was when the commit was made. A run that cannot go on: IncompatibleResumeError.

    `fresh`: the stages of the config. They take the place of those still to come where the commit was made with other
    settings, and with `changes`, which is for commits that do not say so.
    """
    meta = state.read_meta(store, commit)
    if "imported" in meta:
        raise IncompatibleResumeError(
            f"{store.root.parent} is an imported model, which has no training to go on with; give the run that starts "
            "from it a training.run_id of its own"
        )
    check_data(meta, where["identity"])
    stages, progress = state.stages_of(meta), state.progress_of(meta)
    if changes or meta.get("config", course := course_of(config)) != course:
        stages = continued_stages(stages, fresh, progress)
    restore_position(loader, stages, progress, meta)
    restore_metrics(metrics, meta)
    rack = state.load_rack(store, commit, meta)
    engine = Engine(config, rack, stages, loader, progress=progress, **where)
    engine.restore(state.load_optimizer_state(store, commit))
    restore_scale(engine, meta)
    return engine


def check_data(meta: dict[str, Any], identity: Mapping[str, str]) -> None:
    """The text and the tokenizer are those that the run was trained with, whatever their files are called."""
    for name, key in (("corpus", "data"), ("tokenizer", "tokenizer")):
        if meta[name] != identity[key]:
            raise IncompatibleResumeError(
                f"the {name} is another one than the run was trained with (hash {meta[name][:16]} there, "
                f"{identity[key][:16]} here): the text, or how it is read, has changed. The commits are intact; put "
                "the text back to continue, or choose another training.run_id for a new run"
            )


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


def go_back(
    engine: Engine, wish: GoBack, store: Store, metrics: MetricsFile, where: Where, fresh: list[Stage]
) -> Engine:
    """Go on from an earlier commit of this stage, or of the end of the stage before, behind the data seen since.

    The commit is the newest that is `wish.steps` steps old, or else the oldest there is. What it holds is saved again
    at once, so that a run which dies now goes on from here as well. Without such a commit: NumericError.
    """
    engine.report_saves(wait=True)
    p = engine.progress
    commit = _target(store, p, p.step - wish.steps)
    if commit is None:
        raise engine.numeric_error(f"{wish}, and there is no commit of this stage to go back to", wish.facts)
    newest = store.commits()[-1].number
    assert isinstance(engine.loader, TokenLoader)
    engine.drop()
    again = restore(engine.config, engine.loader, store, commit, metrics, where, fresh)
    q = again.progress
    abandoned = [commit.number + 1, newest] if newest > commit.number else []
    q.changes = p.changes
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
