"""Settings of positions that reach beyond the trained length."""

from typing import Literal

from pydantic import Field

from stackwise.config.base import Settings
from stackwise.config.types import Flag, PositiveFloat, PositiveInt


class RopeScalingSettings(Settings):
    """How rotary positions are scaled to rows longer than those of training; formulas in `model.rope_scaling`."""

    type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    """Way of scaling: linear divides all angles, dynamic raises theta with the length of the row, yarn and llama3 divide the slow angles alone, longrope takes a factor per pair."""
    factor: PositiveFloat | None = None
    """How many times longer than trained; at least 1. null: `model.max_seq_len` / `original_max_seq_len`."""
    original_max_seq_len: PositiveInt | None = None
    """Length the model was trained at. null: `model.max_seq_len` / `factor`."""
    attention_factor: PositiveFloat | None = None
    """Factor on rotated queries and keys under yarn and longrope. null: what their papers advise."""
    beta_fast: PositiveFloat = 32.0
    """Under yarn: pairs that turn more often than this within the trained length keep their angle."""
    beta_slow: PositiveFloat = 1.0
    """Under yarn: pairs that turn less often than this within the trained length have it divided by `factor`."""
    mscale: PositiveFloat | None = None
    """Under yarn, with `mscale_all_dim`: the factor on queries and keys is (0.1 m ln factor + 1) for this m over the same for that one. null: no ratio."""
    mscale_all_dim: PositiveFloat | None = None
    """Under yarn: the m below in that ratio. null: no ratio."""
    truncate: Flag = True
    """Under yarn: begin and end the ramp between both kinds of pairs at whole pairs."""
    low_freq_factor: PositiveFloat = 1.0
    """Under llama3: wavelengths above the trained length / this are stretched by `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """Under llama3: wavelengths below the trained length / this are kept."""
    short_factor: list[PositiveFloat] = Field(default_factory=list)
    """Under longrope: what the angle of each pair is divided by in rows up to the trained length; half as many as a head is wide."""
    long_factor: list[PositiveFloat] = Field(default_factory=list)
    """Under longrope: the same for longer rows."""
