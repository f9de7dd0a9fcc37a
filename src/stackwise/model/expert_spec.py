"""Description of a mixture of experts: plain, immutable data without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stackwise.config.errors import did_you_mean

ROUTERS = ("softmax", "sigmoid")
BALANCINGS = ("aux", "bias")


@dataclass(frozen=True)
class ExpertSpec:
    """The experts of a block; see `model.experts`. `width` 0: the block's `d_ff`. Wrong values are ValueErrors.

    The other fields are those of `model.moe`.
    """

    n_experts: int
    top_k: int = 2
    n_shared: int = 0
    width: int = 0
    router: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    balancing: str = "aux"
    aux_weight: float = 0.01
    bias_rate: float = 0.001
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if self.n_experts < 1:
            yield f"n_experts must be at least 1, got {self.n_experts}; leave experts out for a dense feed-forward"
        if not 1 <= self.top_k <= self.n_experts:
            yield f"top_k must be from 1 to n_experts = {self.n_experts}, got {self.top_k}"
        for name in ("n_shared", "width", "aux_weight", "bias_rate", "z_weight"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, got {getattr(self, name)}"
        if not self.scale > 0:
            yield f"the scale of the experts' weights must be above 0, got {self.scale}"
        if self.groups < 1 or self.n_experts % self.groups:
            yield f"groups must divide n_experts: {self.n_experts} is no multiple of {self.groups}"
        elif not 1 <= self.top_groups <= self.groups:
            yield f"top_groups must be from 1 to groups = {self.groups}, got {self.top_groups}"
        elif self.top_k > self.top_groups * (self.n_experts // self.groups):
            held = self.top_groups * (self.n_experts // self.groups)
            yield f"top_k {self.top_k} is more than the {held} experts of {self.top_groups} groups"
        for name, known in (("router", ROUTERS), ("balancing", BALANCINGS)):
            value = getattr(self, name)
            if value not in known:
                close = did_you_mean(value, known)
                yield f"{name} must be {' or '.join(known)}, got {value!r}" + (f"; {close}" if close else "")

    @property
    def share(self) -> float:
        """Share of the tokens that an expert sees where the load is even."""
        return self.top_k / self.n_experts
