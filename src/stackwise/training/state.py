"""The state of a run as parts of a checkpoint, and back.

Parts are named after the rack's: `<part>/weights` for every part, `<part>/optimizer` for those that train. Parts that
did not change since the last commit are shared with it by the store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.store import Store
from stackwise.curriculum.assemble import build_rack
from stackwise.curriculum.stage import Stage
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.training.changes import course_of
from stackwise.training.optim import OptimizerState
from stackwise.training.progress import Progress
from stackwise.training.surroundings import surroundings

if TYPE_CHECKING:
    from stackwise.training.loop import Engine

FORMAT = 1


def parts_of(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """All tensors of a run by part."""
    rack = engine.rack
    parts = {f"{part}/weights": tensors for part, tensors in rack.parts().items()}
    live = {} if engine.optimizers is None else engine.optimizers.state()
    for name, moments in {**engine.parked, **live}.items():
        held = parts.setdefault(f"{rack.part_of(name)}/optimizer", {})
        held.update({f"{name}::{moment}": tensor for moment, tensor in moments.items()})
    return parts


def still_parts(engine: Engine) -> set[str]:
    """Weights that nothing trains in this stage: their bytes stay what they are until it ends."""
    rack = engine.rack
    moving = {rack.part_of(name) for name, p in rack.named_parameters() if p.requires_grad}
    return {f"{part}/weights" for part in rack.parts() if part not in moving}


def fixed_tensors(engine: Engine) -> set[str]:
    """Names of weights that nothing trains in this stage, also in parts of which something else trains."""
    return {name for name, p in engine.rack.named_parameters() if not p.requires_grad}


def meta_of(engine: Engine, extra: dict[str, Any]) -> dict[str, Any]:
    """Everything else: description of the rack, stages, counters, position in the data."""
    return {
        "format": FORMAT,
        "rack": engine.rack.spec.to_dict(),
        "stages": [stage.to_dict() for stage in engine.stages],
        "progress": engine.progress.to_dict(),
        "loader": engine.loader.state_dict(),
        "config": course_of(engine.config),
        "environment": surroundings(engine.device, engine.dtype),
        "scaler": engine.scaler.state_dict() if engine.has_scaled else None,
        **extra,
    }


def full_precision_parts(spec: RackSpec, parent: Commit | None) -> dict[str, tuple[Commit, str]]:
    """Parts of earlier commits that keep the fp32 weights of stacks which are stored in another format by now.

    A stack is converted at the beginning of a stage, and the end of the last one was saved: `parent` has it.
    """
    listed: dict[str, tuple[Commit, str]] = {}
    if parent is None:
        return listed
    for stack in spec.stacks:
        if stack.weight_format != "fp32":
            kept = full_precision_part(stack.uid)
            weights = f"stack:{stack.uid}/weights"
            source = kept if kept in parent.parts else weights
            if source == kept or not any(t.name.endswith(".codes") for t in parent.parts[weights].tensors):
                listed[kept] = (parent, source)
    return listed


def full_precision_part(uid: str) -> str:
    return f"stack:{uid}/full_precision"


def read_meta(store: Store, commit: Commit) -> dict[str, Any]:
    """The commit's run state; another format is a CheckpointError."""
    meta = store.meta(commit)
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"commit {commit.id} has format {meta.get('format')!r}, this version reads {FORMAT}; "
            "use the version of stackwise that wrote it"
        )
    return meta


def load_rack(store: Store, commit: Commit, meta: dict[str, Any]) -> Rack:
    """The rack of a commit, rebuilt from its description and loaded by name."""
    rack = build_rack(RackSpec.from_dict(meta["rack"]))
    tensors: dict[str, Tensor] = {}
    for part in rack.parts():
        tensors.update(store.load(commit, f"{part}/weights"))
    try:
        rack.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"commit {commit.id} does not fit its own description: {error}") from None
    return rack


def load_optimizer_state(store: Store, commit: Commit) -> OptimizerState:
    """Moments by parameter name."""
    state: OptimizerState = {}
    for part in commit.parts:
        if part.endswith("/optimizer"):
            for key, tensor in store.load(commit, part).items():
                name, _, moment = key.partition("::")
                state.setdefault(name, {})[moment] = tensor
    return state


def stages_of(meta: dict[str, Any]) -> list[Stage]:
    return [Stage.from_dict(stage) for stage in meta["stages"]]


def progress_of(meta: dict[str, Any]) -> Progress:
    return Progress.from_dict(meta["progress"])
