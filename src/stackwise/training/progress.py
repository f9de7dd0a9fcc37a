"""Where a run stands: everything besides tensors that a resume needs. JSON-able, floats kept exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from stackwise.training.guard import GuardState


@dataclass
class Progress:
    """Counters of a run. `stage` is 0-based, `stage_step` counts within it, `step` over the run."""

    stage: int = 0
    stage_step: int = 0
    begun: bool = False
    """The current stage's growth has happened."""
    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    """Steps left out by the numerics guard, and those whose scaled gradients were too large for float16."""
    guard: GuardState = field(default_factory=GuardState)
    """What the numerics guard remembers."""
    stage_batches: int = 0
    """Batches of this stage that were trained on or skipped."""
    stage_seconds: float = 0.0
    stage_tokens: int = 0
    stage_flops: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    loss_sum: float = 0.0
    """Losses since the last log line, and how many."""
    loss_count: int = 0
    bytes: dict[str, Any] = field(default_factory=dict)
    """What a step of this stage holds, by item (see `StepBytes.result`); counted at its first step."""
    eval_loss: float | None = None
    """The last evaluation, nats per token."""
    stored: dict[str, int] = field(default_factory=dict)
    """What this stage keeps of its frozen trunk, and what came of it (`records.stored`); empty where it keeps nothing."""
    stores: bool | None = None
    """Whether this stage keeps the outputs of its frozen trunk; decided once, for it may round them."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished stage."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed on the way: step, key, old, new."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        return cls(**{**data, "guard": GuardState(**data.get("guard", {}))})

    def start_stage(self) -> None:
        """Reset what is counted per stage."""
        self.begun, self.stage_step, self.stage_batches = True, 0, 0
        self.guard.start_stage()
        self.stage_seconds, self.stage_tokens, self.stage_flops = 0.0, 0, 0.0
        self.loss_first, self.loss_last, self.loss_sum, self.loss_count = None, None, 0.0, 0
        self.stores, self.stored = None, {}
