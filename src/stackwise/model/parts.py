"""Parts of a block's description that have fields of their own: small, immutable, JSON-able data without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stackwise.config.errors import did_you_mean
from stackwise.model.attention_settings import KERNEL_MODES, KERNEL_NORMS, KERNEL_TYPES


def one_of(name: str, value: str, known: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with a name that must be one of a few."""
    if value not in known:
        close = did_you_mean(value, known)
        yield f"{name} must be one of {', '.join(known)}, got {value!r}" + (f"; {close}" if close else "")


@dataclass(frozen=True)
class LatentSpec:
    """Widths of multi-head latent attention; see `model.attention.mla`. Wrong values are ValueErrors.

    `q_rank` of the query latent (0: queries are not compressed), `kv_rank` of the latent that keys and values share,
    `rope_dim` numbers of a head that are rotated, `nope_dim` that are not and `value_dim` of a value (0: the block's
    head width). `scale` is a factor on the scores, beside 1 / sqrt(nope_dim + rope_dim).
    """

    q_rank: int
    kv_rank: int
    rope_dim: int
    nope_dim: int = 0
    value_dim: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if self.kv_rank < 1:
            yield f"kv_rank must be at least 1, got {self.kv_rank}"
        for name in ("q_rank", "rope_dim", "nope_dim", "value_dim"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, got {getattr(self, name)}"
        if self.rope_dim % 2:
            yield f"rope_dim must be even, since pairs are rotated, got {self.rope_dim}"
        if not self.scale > 0:
            yield f"the scale of the scores must be above 0, got {self.scale}"

    @property
    def cached(self) -> int:
        """Numbers that a cache holds per token."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class KernelSpec:
    """How queries and keys are compared where it is not by their product; see `model.attention.kernel`.

    `features` is the number of random features, `bandwidth` the width of the kernel, `norm` (l2, l1) concerns the
    laplacian one. Wrong values are ValueErrors.
    """

    kind: str
    mode: str = "score"
    features: int = 64
    bandwidth: float = 1.0
    norm: str = "l2"

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        yield from one_of("kernel_type", self.kind, KERNEL_TYPES)
        yield from one_of("kernel_mode", self.mode, KERNEL_MODES)
        yield from one_of("kernel_norm", self.norm, KERNEL_NORMS)
        if self.features < 1:
            yield f"kernel_dim must be at least 1, got {self.features}"
        if not self.bandwidth > 0:
            yield f"kernel_bandwidth must be above 0, got {self.bandwidth}"
        if self.mode == "linear" and self.kind in ("laplacian", "uniform"):
            yield f"the {self.kind} kernel has no positive features, which kernel_mode linear needs; take gaussian"
        if self.kind == "linear" and self.mode != "linear":
            yield "the linear kernel is plain attention, but in kernel_mode linear; leave kernel out"
        if self.norm == "l1" and self.kind != "laplacian":
            yield f"kernel_norm l1 is that of the laplacian kernel, not of {self.kind}"
