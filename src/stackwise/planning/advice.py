"""What to change when a run does not fit. Everything advised was planned, so it is known to fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stackwise.config.notes import tunes_jointly
from stackwise.config.rules import stacks_at_the_end
from stackwise.planning.compare import Changes, fitted
from stackwise.planning.report import Plan

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


@dataclass(frozen=True)
class Advice:
    """Keys to change, and the plan that results."""

    changes: Changes
    plan: Plan

    @property
    def fits(self) -> bool:
        return self.plan.fits != "no"

    def overrides(self) -> str:
        """What to add to the command line."""
        return " ".join(f"{key}={_shown(value)}" for key, value in self.changes.items())

    def to_dict(self) -> dict[str, Any]:
        return {
            "changes": self.changes,
            "fits": self.plan.fits,
            "peak_bytes": self.plan.peak_bytes,
            "hours": self.plan.hours,
        }


def advise(config: StackWiseConfig, own: Plan) -> list[Advice]:
    """Single changes that make the run fit; if none does, all that help together, as few as are needed.

    The last of the list may not fit either: then it is the smallest that was reached.
    """
    singles = [advice for group in _groups(config) if (advice := _first_fit(config, group, own)) is not None]
    if singles:
        return sorted(singles, key=lambda advice: advice.plan.hours)
    together: Changes = {}
    best: Advice | None = None
    for group in _groups(config):
        for changes in group:
            laid_out = fitted(config, {**together, **changes}, own, own.largest.name)
            if laid_out is None or laid_out.peak_bytes >= (best.plan if best else own).peak_bytes:
                continue
            if (laid_out := fitted(config, {**together, **changes}, own)) is None:
                continue
            together |= changes
            best = Advice(dict(together), laid_out)
            if best.fits:
                return [best]
    return [best] if best is not None else []


def _first_fit(config: StackWiseConfig, group: list[Changes], own: Plan) -> Advice | None:
    """The mildest change of a group that fits."""
    for changes in group:
        for only in (own.largest.name, None):  # most changes fail where the run is largest
            laid_out = fitted(config, changes, own, only)
            if laid_out is None or laid_out.fits == "no":
                break
        else:
            assert laid_out is not None
            return Advice(changes, laid_out)
    return None


def _groups(config: StackWiseConfig) -> Iterator[list[Changes]]:
    """Changes of one kind, the mildest first; those that change what is computed come last."""
    training, progressive = config.training, config.training.progressive
    if not training.gradient_checkpointing:
        yield [{"training.gradient_checkpointing": True}]
    yield [
        {
            "training.batch_size": rows,
            "training.gradient_accumulation_steps": training.gradient_accumulation_steps
            * (training.batch_size // rows),
        }
        for rows in _halves(training.batch_size)
    ]
    if training.optimizer.state_device != "host":
        yield [{"training.optimizer.state_device": "host"}]
    if progressive.trunk_residency == "resident" and progressive.enabled:
        yield [{"training.progressive.trunk_residency": "streamed"}]
    if training.residency == "resident":
        yield [{"training.residency": "streamed"}]
    if tunes_jointly(config):
        yield [{"training.progressive.joint_tuning": False}]
    if progressive.enabled and progressive.trunk_precision is None:
        yield [{"training.progressive.trunk_precision": "nf4"}]
    kinds = ("full", "int8", "int8_nomaster", "fused")
    harder = kinds[kinds.index(training.optimizer.memory) + 1 :]
    yield [{"training.optimizer.memory": memory, **_allows(memory, config)} for memory in harder]
    yield list(_shorter_stacks(config))


def _allows(memory: str, config: StackWiseConfig) -> Changes:
    """What an update within the backward pass needs."""
    if memory != "fused":
        return {}
    training = config.training
    accumulated: Changes = {}
    if training.gradient_accumulation_steps > 1:
        accumulated["training.gradient_accumulation_steps"] = 1
    return {**accumulated, **({"training.max_grad_norm": 0} if training.max_grad_norm else {})}


def _halves(rows: int) -> Iterator[int]:
    """Half of it, half of that, as long as it divides."""
    while rows % 2 == 0 and rows > 1:
        rows //= 2
        yield rows


def _shorter_stacks(config: StackWiseConfig) -> Iterator[Changes]:
    """More stacks of fewer blocks, the same model."""
    architecture, progressive = config.model.architecture, config.training.progressive
    stacks, blocks = stacks_at_the_end(config), architecture.blocks_per_stack
    if not progressive.enabled or progressive.stage_weights is not None:
        return
    while blocks % 2 == 0:
        stacks, blocks = stacks * 2, blocks // 2
        yield {
            "model.architecture.n_stacks": stacks,
            "model.architecture.blocks_per_stack": blocks,
            "training.progressive.target_stacks": None,
            "training.progressive.max_stacks": max(stacks, progressive.max_stacks),
        }


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
