"""Rotary positions beyond the length that a model was trained at: other angles per position, without torch.

Pair i of W numbers turns by m w_i at position m; without scaling w_i = theta^(-2i/W). With s = factor and L the trained
length:

    linear    w_i / s                                                              (Chen et al. 2023, arXiv 2306.15595)
    dynamic   theta grows with the length n of the row: theta (s n / L - (s - 1))^(W / (W - 2)) where n > L
              ("NTK-aware"; described in Peng et al. 2023, arXiv 2309.00071)
    yarn      pairs that turn more than beta_fast times within L stay, those below beta_slow turns become w_i / s, a
              ramp between; queries and keys grow by 0.1 ln s + 1                   (Peng et al. 2023, arXiv 2309.00071)
    llama3    wavelengths below L / high_freq_factor stay, those above L / low_freq_factor become w_i / s, a ramp in
              1 / wavelength between                                           (Grattafiori et al. 2024, arXiv 2407.21783)
    longrope  w_i / f_i with factors f found by search: short_factor up to L tokens, long_factor beyond; queries and keys
              grow by sqrt(1 + ln s / ln L)                                          (Ding et al. 2024, arXiv 2402.13753)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from stackwise.config.errors import did_you_mean

SHARED = ("type", "factor", "original_max_seq_len")
FIELDS_OF: dict[str, tuple[str, ...]] = {
    "linear": SHARED,
    "dynamic": SHARED,
    "yarn": (
        *SHARED,
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (*SHARED, "attention_factor", "short_factor", "long_factor"),
    "llama3": (*SHARED, "low_freq_factor", "high_freq_factor"),
}
"""Type -> the fields that it reads; another one that is set is refused."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are scaled. Wrong values, and fields that the type does not read, are ValueErrors.

    `original_max_seq_len` is the trained length. `attention_factor` null: as the type says; `mscale` and
    `mscale_all_dim`, both or none, make it their ratio (DeepSeek). `truncate`: yarn's ramp begins and ends at whole pairs.
    """

    type: str
    factor: float
    original_max_seq_len: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):  # lists, where the description was read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if self.type not in FIELDS_OF:
            close = did_you_mean(self.type, FIELDS_OF)
            yield f"rope_scaling must be one of {', '.join(FIELDS_OF)}, got {self.type!r}" + (
                f"; {close}" if close else ""
            )
            return
        for field in fields(self):
            if getattr(self, field.name) != field.default and field.name not in FIELDS_OF[self.type]:
                yield f"{field.name} has no effect on rope_scaling {self.type}; it reads {', '.join(FIELDS_OF[self.type])}"
        if not self.factor >= 1:
            yield f"the factor of rope_scaling must be at least 1, got {self.factor}"
        if self.original_max_seq_len < 2:
            yield f"original_max_seq_len must be at least 2, got {self.original_max_seq_len}"
        if not self.beta_fast > self.beta_slow > 0:
            yield f"beta_fast must be above beta_slow, and that above 0, got {self.beta_fast} and {self.beta_slow}"
        if not self.high_freq_factor > self.low_freq_factor > 0:
            yield (
                "high_freq_factor must be above low_freq_factor, and that above 0, got "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            yield "mscale and mscale_all_dim are given together or not at all"
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"{name} must be above 0, got {value}"

    def problems_of(self, width: int) -> Iterator[str]:
        """What is wrong for `width` rotated numbers per head."""
        if self.type == "dynamic" and width < 4:
            yield f"rope_scaling dynamic needs at least 4 rotated numbers per head, got {width}"
        if self.type == "longrope":
            for name in ("short_factor", "long_factor"):
                values = getattr(self, name)
                if len(values) != width // 2 or not all(value > 0 for value in values):
                    yield f"{name} needs {width // 2} numbers above 0, one per pair of a head, got {len(values)}"

    @property
    def depends_on_length(self) -> bool:
        """Whether a row is turned otherwise once it is longer than the trained length."""
        return self.type in ("dynamic", "longrope")

    @property
    def magnitude(self) -> float:
        """Factor on rotated queries and on rotated keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.type == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_seq_len))
        if self.type == "yarn":
            if self.mscale is not None and self.mscale_all_dim is not None:
                return growth(self.factor, self.mscale) / growth(self.factor, self.mscale_all_dim)
            return growth(self.factor)
        return 1.0

    def base(self, theta: float, width: int, length: Any) -> Any:
        """The theta of dynamic scaling for rows of `length` >= L tokens, a number or a tensor of them."""
        stretch = self.factor * length / self.original_max_seq_len - (self.factor - 1)
        return theta * stretch ** (width / (width - 2))


def growth(factor: float, mscale: float = 1.0) -> float:
    """Yarn's factor on queries and keys: 0.1 m ln s + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(
    width: int, theta: float, scaling: RopeScaling | None = None, length: int = 0
) -> tuple[float, ...]:
    """Angles per position of the `width` / 2 pairs, for rows of up to `length` tokens."""
    if scaling is not None and scaling.type == "dynamic":
        theta = scaling.base(theta, width, max(length, scaling.original_max_seq_len))
    plain = [theta ** (-i / width) for i in range(0, width, 2)]
    if scaling is None or scaling.type == "dynamic":
        return tuple(plain)
    if scaling.type == "linear":
        return tuple(w / scaling.factor for w in plain)
    if scaling.type == "longrope":
        long = length > scaling.original_max_seq_len
        factors = scaling.long_factor if long else scaling.short_factor
        return tuple(w / f for w, f in zip(plain, factors, strict=True))
    stays = _yarn_ramp(width, theta, scaling) if scaling.type == "yarn" else _llama3_ramp(plain, scaling)
    return tuple(w * share + w / scaling.factor * (1 - share) for w, share in zip(plain, stays, strict=True))


def _yarn_ramp(width: int, theta: float, scaling: RopeScaling) -> list[float]:
    """How much of each pair's own angle stays, 0 to 1."""

    def pair_of(turns: float) -> float:
        """The pair, as a real number, that turns so often within the trained length."""
        wavelengths = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return width * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    return [1 - min(1.0, max(0.0, (i - low) / span)) for i in range(width // 2)]


def _llama3_ramp(plain: list[float], scaling: RopeScaling) -> list[float]:
    """How much of each pair's own angle stays, 0 to 1."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = [scaling.original_max_seq_len * w / (2 * math.pi) for w in plain]
    return [min(1.0, max(0.0, (n - low) / (high - low))) for n in turns]
