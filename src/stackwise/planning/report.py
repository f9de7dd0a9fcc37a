"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from stackwise.planning.devices import Device

if TYPE_CHECKING:
    from stackwise.config.resolve import Derived
    from stackwise.data.corpus import Corpus
    from stackwise.planning.count import StageBytes


@dataclass(frozen=True)
class StagePlan:
    """One stage. `flops` of the whole stage; `units` of a step, in forward passes of one block.

    `bytes` are the items that a run counts (parameters, gradients, moments, activations, buffers), `memory` all that
    is known of them. `active_parameters`: those that a token meets, fewer than all where experts share the work. `trunk`: none, recomputed, cached, streamed or mapped, with `trunk_reason`. `copied_bytes`: in
    main memory while a save is written beside the training. `disk`: what the stage writes,
    `checkpoint` for good, `resume` for its resume points, `cache` for stored outputs of the trunk.
    """

    name: str
    grows: str
    trains: list[str]
    n_stacks: int
    prefix_blocks: int
    trained_blocks: int
    total_blocks: int
    steps: int
    tokens: int
    parameters: int
    active_parameters: int
    trainable_parameters: int
    flops: float
    units: int
    hours: float
    memory: StageBytes
    fits: str
    trunk: str
    trunk_reason: str
    copied_bytes: int
    disk: dict[str, int]

    @property
    def bytes(self) -> dict[str, int]:
        return self.memory.items

    @property
    def peak_bytes(self) -> int:
        """The most alive at once on the device."""
        return self.memory.peak

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "memory": self.memory.to_dict(),
            "bytes": self.bytes,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """All stages of a run on a device, the values that were derived with their reasons, and notes.

    `rate`: FLOP per second that hours are reckoned with, `rate_source` where it is from. `edges`: rows may hold edges of
    documents or padding, so attention is reckoned with a mask. `corpus`: the data, where it was needed.
    """

    stages: list[StagePlan]
    derived: list[Derived]
    notes: list[str]
    device: Device
    dtype: str
    rate: float
    rate_source: str
    curriculum: str = ""
    edges: bool = False
    corpus: Corpus | None = field(default=None, repr=False, compare=False)

    @property
    def total_flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def largest(self) -> StagePlan:
        """The stage that takes the most memory."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most alive at once in any stage."""
        return self.largest.peak_bytes

    @property
    def fits(self) -> str:
        """yes, tight or no: of the largest stage."""
        return self.largest.fits

    @property
    def host_bytes(self) -> int:
        """The most that a stage keeps in host memory."""
        return max(stage.memory.host_total for stage in self.stages)

    @property
    def copied_bytes(self) -> int:
        """The most that a save copies into main memory, on top of all else."""
        return max(stage.copied_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Checkpoints and resume points of the whole run, and the largest store of activations."""
        kept = sum(stage.disk["checkpoint"] for stage in self.stages)
        resume = max(stage.disk["resume"] for stage in self.stages)
        return kept + resume + max(stage.disk["cache"] for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "curriculum": self.curriculum,
            "device": asdict(self.device),
            "dtype": self.dtype,
            "rate": self.rate,
            "rate_source": self.rate_source,
            "edges": self.edges,
            "stages": [stage.to_dict() for stage in self.stages],
            "derived": [asdict(derived) for derived in self.derived],
            "notes": self.notes,
            "total_flops": self.total_flops,
            "total_tokens": self.total_tokens,
            "hours": self.hours,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "host_bytes": self.host_bytes,
            "copied_bytes": self.copied_bytes,
            "disk_bytes": self.disk_bytes,
        }
