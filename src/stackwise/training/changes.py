"""What may change when a run is resumed, and how its stages go on with it; the classes are `config.resume_classes`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from stackwise.config.document import flattened
from stackwise.config.errors import ConfigError, Problem, did_you_mean, show
from stackwise.config.resolve import resolve
from stackwise.config.resume_classes import Kind, class_of
from stackwise.config.root import StackWiseConfig
from stackwise.config.schema import schema_rows
from stackwise.curriculum.stage import Stage
from stackwise.training.errors import IncompatibleResumeError
from stackwise.training.progress import Progress

SCHEDULE = {
    *("name", "steps", "lr", "trunk_lr", "io_lr", "adapter_lr", "warmup_steps", "schedule", "data_start"),
    "batch_size",
}
"""Fields of a stage that may change while it is still to come."""


@dataclass(frozen=True)
class Change:
    """A key that decides the course of a run and has another value."""

    key: str
    kind: Kind
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {show(self.old)} there, {show(self.new)} here"


def course_of(config: StackWiseConfig) -> dict[str, Any]:
    """The keys that decide the course of a run, dotted, with their values as JSON has them.

    Lists of maps are taken apart as well: `training.stages.0.lr`.
    """
    flat = flattened(json.loads(json.dumps(config.to_dict())))
    return {key: value for key, value in flat.items() if class_of(key) != "free"}


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two courses (`course_of`). A key that the old one does not know had its default value."""
    defaults = course_of(StackWiseConfig())
    return [
        Change(key, _kind(key), old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key not in old and new[key] == defaults.get(key, ...))
    ]


def _kind(key: str) -> Kind:
    try:
        return class_of(key)
    except KeyError:  # of another version
        return "identity"


def check_allowed(allow: Iterable[str]) -> list[str]:
    """The keys of `--allow-change`: keys of the schedule, or sections that hold some. Else ConfigError."""
    known = {row.key for row in schema_rows()}
    sections = {".".join(key.split(".")[:i]) for key in known for i in range(1, key.count(".") + 1)}
    problems, listed = [], [key.strip() for key in allow if key.strip()]
    for key in listed:
        named = ".".join("N" if part.isdecimal() else part for part in key.split("."))
        if named not in known | sections:
            problems.append(Problem(key, "unknown key in --allow-change", hint=did_you_mean(key, known)))
        elif named not in sections and class_of(key) == "identity":
            hint = "start another run from its weights: checkpoint.init_from"
            problems.append(Problem(key, "says what is trained, which cannot change within a run", hint=hint))
    if problems:
        raise ConfigError(problems)
    return listed


def approve(
    changes: list[Change],
    allow: Collection[str],
    run: Path,
    follows: Collection[str] = (),
    would_follow: Collection[str] = (),
) -> list[Change]:
    """The changes to apply, all of the schedule and allowed; otherwise IncompatibleResumeError with those that are not.

    `follows`: keys that nobody has set and that follow from allowed ones. `would_follow`: the same if all were allowed.
    """

    def allowed(key: str) -> bool:
        return key in follows or any(key == given or key.startswith(f"{given}.") for given in allow)

    refused = [c for c in changes if c.kind == "identity" or not allowed(c.key)]
    if not refused:
        return changes
    lines = "\n".join(f"  {change}  ({change.kind})" for change in refused)
    asked = ",".join(c.key for c in refused if c.kind == "schedule" and c.key not in would_follow)
    ways = ["use its settings to continue it"]
    if any(c.kind == "identity" for c in refused):
        ways.append(
            f"start another run from its weights with checkpoint.init_from={run} and another training.run_id"
        )
    else:
        ways.append(f"apply the new ones from here on with --allow-change {asked}")
        ways.append(
            f"let a new run go on from here with them: stackwise ckpt fork {run} latest NEW_RUN KEY=VALUE ..."
        )
    ways.append("replace it with checkpoint.overwrite=true")
    raise IncompatibleResumeError(
        f"{run} holds a run with other settings:\n{lines}\nIts commits are intact. Ways out:\n"
        + "\n".join(f"  - {way}" for way in ways)
    )


def following(
    config: StackWiseConfig, changes: list[Change], allow: Collection[str], **vocabulary: Any
) -> set[str]:
    """Keys that nobody has set in `config`, and whose change comes from allowed ones alone.

    They are those that would have the old value if the allowed keys had theirs. `vocabulary`: as for `resolve`.
    """
    named = [c for c in changes if any(c.key == given or c.key.startswith(f"{given}.") for given in allow)]
    before = config.model_copy(deep=True)
    for change in named:
        *sections, name = change.key.split(".")
        section: Any = before
        for part in sections:
            section = getattr(section, part, None)
        if section is not None and hasattr(section, name):
            setattr(section, name, change.old)
    resolved, derived = resolve(before, **vocabulary)
    course = course_of(resolved)
    unset = {value.key for value in derived}
    return {c.key for c in changes if c.key in unset and course.get(c.key) == c.old}


def continued_stages(stored: list[Stage], fresh: list[Stage], progress: Progress) -> list[Stage]:
    """The stages of a run that goes on with other settings: those that are over as they were, the others anew.

    `fresh`: the stages of the new settings. Where they are not the same program, or less than what is done, or share a
    schedule with stages that are over and had another length: IncompatibleResumeError.
    """
    if len(stored) != len(fresh):
        raise _unfit(f"the run has {len(stored)} stages, and with the new settings {len(fresh)}")
    current, done = progress.stage, progress.stage_step
    at_end = current < len(stored) and done == stored[current].steps
    if at_end and current + 1 < len(stored):
        current, done = current + 1, 0
    listed = list(stored[:current])
    for i in range(current, len(stored)):
        old, new = stored[i], fresh[i]
        for field in fields(Stage):
            if field.name not in SCHEDULE and getattr(old, field.name) != getattr(new, field.name):
                was, now = getattr(old, field.name), getattr(new, field.name)
                raise _unfit(f"stage {i + 1} ({old.name}) would have another {field.name}: {now}, not {was}")
        if i == progress.stage and progress.begun and new.data_start != old.data_start:
            new = replace(new, data_start=old.data_start)
        if i == current and new.steps < done:
            raise _unfit(
                f"stage {i + 1} ({old.name}) has taken {done} steps already, more than the new {new.steps}"
            )
        listed.append(new)
    for i, new in enumerate(listed):
        shares = [
            j
            for j in range(current)
            if new.schedule and stored[j].schedule and stored[j].steps != fresh[j].steps
        ]
        if i >= current and shares and new.schedule != stored[i].schedule:
            over = stored[shares[0]]
            raise _unfit(
                f"stages {shares[0] + 1} and {i + 1} share one schedule, and the first of them, which is over, took "
                f"{over.steps} steps where the new settings give it {fresh[shares[0]].steps}"
            )
    return listed


def _unfit(what: str) -> IncompatibleResumeError:
    return IncompatibleResumeError(
        f"the run cannot go on with these settings: {what}. Its commits are intact; use its settings, or another "
        "training.run_id for a new run"
    )


def record(changes: list[Change], step: int) -> list[dict[str, Any]]:
    """Changes as the manifests keep them."""
    return [{"step": step, **asdict(change)} for change in changes]
