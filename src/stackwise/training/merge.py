"""One run out of several that trained independent stacks of the same model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.store import Store
from stackwise.config.document import dump
from stackwise.config.errors import show
from stackwise.config.notes import tunes_jointly
from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.config.rules import program_of, stacks_at_the_end
from stackwise.curriculum.joint import joint_stages
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.spec import RackSpec
from stackwise.tracking.events import Tracker
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import MetricsFile, read_metrics
from stackwise.training import state
from stackwise.training.changes import changes_between, course_of
from stackwise.training.progress import Progress
from stackwise.training.stored import OpenRun, open_run

AROUND = ("embedding", "norm", "head")


class MergeError(CheckpointError):
    """Runs that do not belong together, though each is whole."""

    exit_code = 7


@dataclass
class Merged:
    """What a merge made. `positions`: position -> the run that its stack comes from."""

    folder: RunFolder
    positions: dict[int, Path]
    goes_on: bool
    """A joint phase is left: training the merged configuration runs it."""


def merge(runs: list[str | Path], out: str | Path) -> Merged:
    """Unite the stacks of finished runs of `building_mode: independent` in a new run folder.

    The runs agree in everything but `train_stacks`, where they started from, and their names. Embedding, norm and head
    are those of the run that trained the stack next to the head; the others must have started from them. Raises
    CheckpointError naming differing keys, positions that are doubled or missing, and runs that are not finished or
    not independent; RunFolderError where `out` holds a run.
    """
    opened = [open_run(path) for path in runs]
    config = _common_config(opened)
    count = stacks_at_the_end(config)
    base, positions = _place(opened, count)
    _check_around(base, opened)
    folder = RunFolder.create(out)
    config, _ = resolve(config)  # what a joint phase needs was of no use to the parts
    config.training.run_id, config.checkpoint.dir = folder.path.name, str(folder.path.parent)
    folder.write_config(dump(config.to_dict()))
    folder.write_environment()
    base.tokenizer.save(folder.tokenizer)
    spec, parts = _rack(base, opened)
    stages = [_whole(stage, count) for run in opened for stage in state.stages_of(run.meta)]
    order = sorted(range(len(stages)), key=lambda i: (stages[i].alone or 0, stages[i].data_start or 0))
    history = [entry for run in opened for entry in _history(run)]
    listed, entries = [stages[i] for i in order], [history[i] for i in order]
    progress = _progress(opened, listed, entries)
    joint = joint_stages(config, listed) if tunes_jointly(config) else []
    written = _write_metrics(folder, base, config, [*listed, *joint], progress)
    meta = {
        **base.meta,
        "config": course_of(config),
        "rack": spec.to_dict(),
        "stages": [stage.to_dict() for stage in [*listed, *joint]],
        "progress": progress.to_dict(),
        **written,
    }
    Store(folder.store).commit(parts, meta, step=progress.step, pin="merged")
    return Merged(folder, {p: positions[p].folder.path for p in sorted(positions)}, bool(joint))


def _common_config(runs: list[OpenRun]) -> StackWiseConfig:
    """The configuration that the runs share, for all stacks."""

    def shared(run: OpenRun) -> StackWiseConfig:
        config = run.config.model_copy(deep=True)
        config.training.progressive.train_stacks = None
        config.checkpoint.init_from = None
        return config

    first = shared(runs[0])
    for run in runs:
        if program_of(run.config) != "independent":
            raise MergeError(
                f"{run.folder.path} is no run of independent stacks (training.progressive.building_mode is "
                f"{run.config.training.progressive.building_mode}); only those can be merged"
            )
        if changed := changes_between(course_of(first), course_of(shared(run))):
            raise MergeError(
                f"{run.folder.path} has another configuration than {runs[0].folder.path}:\n"
                + "\n".join(f"  {c.key}: {show(c.new)}, not {show(c.old)}" for c in changed)
            )
        for name in ("corpus", "tokenizer"):
            if run.meta.get(name) != runs[0].meta.get(name):
                raise MergeError(f"{run.folder.path} has another {name} than {runs[0].folder.path}")
        progress, stages = state.progress_of(run.meta), state.stages_of(run.meta)
        if (progress.stage, progress.stage_step) != (len(stages) - 1, stages[-1].steps):
            raise MergeError(
                f"{run.folder.path} is not finished (stage {progress.stage + 1} of {len(stages)}, step "
                f"{progress.stage_step} of {stages[progress.stage].steps}); "
                f"continue it: stackwise train {run.folder.config} --resume"
            )
    return first


def _place(runs: list[OpenRun], count: int) -> tuple[OpenRun, dict[int, OpenRun]]:
    """The run that trained what is around the stacks, and which run each position comes from."""
    positions: dict[int, OpenRun] = {}
    problems = []
    for run in runs:
        for built in sorted({stage.alone or 0 for stage in state.stages_of(run.meta)}, reverse=True):
            position = count - 1 - built
            if position in positions:
                first = positions[position].folder.path
                problems.append(f"position {position} is in {first} and in {run.folder.path}")
            positions.setdefault(position, run)
    if missing := [position for position in range(count) if position not in positions]:
        problems.append(f"no run has trained the position {', '.join(map(str, missing))}")
    if problems:
        raise MergeError(f"the runs do not make up the {count} stacks of the model: {'; '.join(problems)}")
    return positions[count - 1], positions


def _check_around(base: OpenRun, runs: list[OpenRun]) -> None:
    for run in runs:
        for part in AROUND:
            name = f"{part}/weights"
            own, other = base.commit.parts.get(name), run.commit.parts.get(name)
            if (own and own.sha256) != (other and other.sha256):
                raise MergeError(
                    f"{run.folder.path} has another {part} than {base.folder.path}, which trained it: train its stacks "
                    f"again with checkpoint.init_from={base.folder.path}",
                    part=name,
                )


def _rack(base: OpenRun, runs: list[OpenRun]) -> tuple[RackSpec, dict[str, dict[str, Tensor]]]:
    """The united description and its parts; stacks in the formats in which the runs ended."""
    stacks = [stack for run in runs for stack in run.rack.spec.stacks]
    spec = base.rack.spec.with_stacks(sorted(stacks, key=lambda stack: -stack.build_index))
    parts: dict[str, dict[str, Tensor]] = {}
    for run in runs:
        store = Store(run.folder.store)
        for name in run.commit.parts:
            of_stack = name.startswith("stack:")
            if not name.endswith("/optimizer") and (of_stack or run is base):
                parts[name] = store.load(run.commit, name)
    return spec, parts


def _whole(stage: Stage, count: int) -> Stage:
    """A stage as it would be in a run of all stacks."""
    position = count - 1 - (stage.alone or 0)

    def renamed(selector: str) -> str:
        kind, colon, rest = selector.partition(":")
        if kind == "block":
            return f"block:{position}.{rest.partition('.')[2]}"
        return f"{kind}:{position}" if colon else selector

    return replace(stage, n_stacks=count, trains=tuple(renamed(selector) for selector in stage.trains))


def _history(run: OpenRun) -> list[dict[str, Any]]:
    """One entry per stage, from the metrics: the last one ends after the last commit."""
    ends = {e["stage"]: e for e in read_metrics(run.folder.metrics).events if e["event"] == "stage_end"}
    entries = []
    for index, stage in enumerate(state.stages_of(run.meta)):
        if index not in ends:
            raise MergeError(
                f"{run.folder.path} has no record of the end of stage {index + 1}; "
                f"continue it: stackwise train {run.folder.config} --resume"
            )
        facts = {key: value for key, value in ends[index].items() if key not in ("event", "time")}
        entries.append({**facts, "steps": stage.steps, "trains": sorted(trained_units(run.rack.spec, stage))})
    return entries


def _progress(runs: list[OpenRun], stages: list[Stage], history: list[dict[str, Any]]) -> Progress:
    counted = [state.progress_of(run.meta) for run in runs]
    step = 0
    for index, (stage, entry) in enumerate(zip(stages, history, strict=True)):
        step += stage.steps
        entry.update(stage=index, step=step, n_stacks=stage.n_stacks)
    return Progress(
        stage=len(stages),
        step=step,
        tokens=sum(p.tokens for p in counted),
        flops=sum(p.flops for p in counted),
        seconds=sum(p.seconds for p in counted),
        skipped=sum(p.skipped for p in counted),
        loss_last=history[-1]["loss_last"],
        history=history,
    )


def _write_metrics(
    folder: RunFolder, base: OpenRun, config: StackWiseConfig, stages: list[Stage], progress: Progress
) -> dict[str, Any]:
    """The events of a run that has these stages behind it; returns what a commit notes of them."""
    start = next(e for e in read_metrics(base.folder.metrics).events if e["event"] == "run_start")
    sizes = {name: start["stages"][0][name] for name in ("params", "trainable_params")}
    rows = [
        {"name": s.name, "n_stacks": s.n_stacks, "steps": s.steps, **sizes, "trains": list(s.trains)}
        for s in stages
    ]
    metrics = MetricsFile(folder.path)
    with Tracker([metrics]) as tracker:
        del start["time"]
        tracker.emit(
            {
                **start,
                "run_id": config.training.run_id,
                "stages": rows,
                "total_steps": sum(stage.steps for stage in stages),
                "start_step": 0,
            }
        )
        for entry in progress.history:
            facts = {key: value for key, value in entry.items() if key not in ("steps", "trains")}
            tracker.emit({"event": "stage_end", **facts})
        return metrics.fingerprint()
