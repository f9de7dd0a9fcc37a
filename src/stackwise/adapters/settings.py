"""Settings of the room; they are part of `training.progressive`."""

from typing import Annotated, Literal

from annotated_types import MinLen

from stackwise.config.base import Settings
from stackwise.config.types import Allowed, BelowOne, Flag, Index, PositiveFloat, PositiveInt, Text

Pattern = Literal["constant", "increasing", "decreasing", "linear"]


class SetSize(Settings):
    """One row of `qlora_configs`."""

    rank: PositiveInt
    """Rank of the set."""
    alpha: PositiveFloat
    """Strength of the set: its change is multiplied by alpha / rank."""
    dropout: BelowOne | None = None
    """Dropout of the set's input. null: `qlora_dropout`."""


class AdapterKeys(Settings):
    """Keys of `training.progressive` that this room reads."""

    qlora_enabled: Flag = False
    """Give every stack an adapter set `stack` when it is made."""
    qlora_rank: PositiveInt = 16
    """Rank of the set `stack`; the width of a bottleneck."""
    qlora_alpha: PositiveFloat = 32.0
    """Strength of the set `stack`: its change is multiplied by alpha / rank. MoRA and bottlenecks have no such factor."""
    qlora_dropout: BelowOne = 0.1
    """Dropout of the input of every adapter set."""
    qlora_lr: PositiveFloat = 1e-5
    """Learning rate of all adapter sets."""
    qlora_method: Literal["lora", "dora", "mora", "bottleneck"] = "lora"
    """What the sets are: lora; dora, which trains lengths and directions of rows apart; mora, one square matrix of high rank; bottleneck, a small network behind each sub-layer, which cannot be merged."""
    qlora_target_modules: Text | Annotated[list[Text], MinLen(1)] = "all-linear"
    """The layers with adapters: all-linear (for bottlenecks: behind every sub-layer), names such as q or attn.q, or a regular expression for whole paths such as blocks.0.attn.q."""
    qlora_use_rslora: Flag = False
    """Multiply by alpha / sqrt(rank) in place of alpha / rank, which keeps large ranks from fading."""
    qlora_strategy: Literal["simplified", "progressive", "variable"] = "simplified"
    """Sizes of the sets `stack`: all alike (simplified), by patterns along the order of building (progressive), from a table (variable)."""
    qlora_rank_pattern: Pattern = "constant"
    """Rank of the b-th stack under progressive: r; increasing, r 2^b; decreasing, max(1, r / 2^b); linear, r + 8 b."""
    qlora_alpha_pattern: Pattern = "constant"
    """Alpha of the b-th stack under progressive, likewise; linear, alpha + 16 b."""
    qlora_configs: Annotated[
        dict[Index, SetSize],
        Allowed("map of build index, from 0, to {rank, alpha, dropout}"),
    ] = {}
    """Table for variable: build index -> {rank, alpha, dropout}, dropout may be left out. A stack without a row gets qlora_rank and qlora_alpha, and a warning."""
    progressive_qlora: Flag = False
    """Add a second set `trunk` to every older stack when a younger one arrives. Needs `qlora_enabled`."""
    progressive_qlora_rank: PositiveInt = 8
    """Rank of the sets `trunk`."""
    progressive_qlora_alpha: PositiveFloat = 16.0
    """Strength of the sets `trunk`: their change is multiplied by alpha / rank."""
    trunk_lora_mode: Literal["reuse", "merge"] = "reuse"
    """What becomes of the sets `trunk` when the next stack arrives: they go on (reuse), or are folded into the stored weights and start anew (merge)."""
