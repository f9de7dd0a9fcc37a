"""The time of the noise as an input: features of a number per row, added to the embedding or as scale and shift.

    sinusoidal   sin and cos of 1000 t / 10000^(2i/width)  ->  Linear, SiLU, Linear   (Ho et al. 2020, arXiv 2006.11239)
    learned      row k = min(floor(t H), H - 1) of a table [H, width]  ->  Linear
    add          what comes out is added to the embedding of every position
    adaln        SiLU and a further Linear make the scale and the shift of both norms of a block, the same for all
                 blocks (DiT: Peebles and Xie 2022, arXiv 2212.09748; one for all blocks: Chen et al. 2023, arXiv
                 2310.00426). That Linear starts at zero, so the model starts as the one without time.

Shape letters: B batch, W width of the features, D model width, H steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.model.linear import Linear
from stackwise.model.spec import TimeSpec


class Condition(NamedTuple):
    """What the blocks of a pass are told of the time; one of the two is null.

    `added` [B, 1, D] belongs to the embedding. `norms` [4, B, 1, D]: scale and shift behind the norm of attention,
    then of the feed-forward: N(x) * (1 + scale) + shift.
    """

    added: Tensor | None = None
    norms: Tensor | None = None


def step_of(time: Tensor, n_steps: int) -> Tensor:
    """The step of times in (0, 1]: int64, k = min(floor(t H), H - 1)."""
    return (time.double() * n_steps).floor().long().clamp_max(n_steps - 1)


def sinusoidal_features(time: Tensor, width: int) -> Tensor:
    """sin and cos of 1000 t / 10000^(2i/width), in pairs. [B] -> [B, width], fp32 or wider."""
    wide = torch.promote_types(time.dtype, torch.float32)
    pairs = torch.arange(0, width, 2, dtype=wide, device=time.device)
    angles = 1000.0 * time.to(wide)[:, None] * 10_000.0 ** (-pairs / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[:, :width]


class TimeInput(nn.Module):
    """Times float [B] in (0, 1] -> the `Condition` of a pass."""

    def __init__(self, spec: TimeSpec, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        learned, added = spec.encoding == "learned", spec.conditioning == "add"
        self.table = nn.Parameter(torch.empty(spec.steps, spec.width)) if learned else None
        self.hidden = None if learned else Linear(spec.width, d_model)
        inner = spec.width if learned else d_model
        self.added = Linear(inner, d_model) if added else None
        self.out = None if added else Linear(inner, d_model)
        self.modulation = None if added else Linear(d_model, 4 * d_model)

    def forward(self, time: Tensor) -> Condition:
        if self.added is not None:
            return Condition(added=self.added(self._features(time)).unsqueeze(1))
        assert self.out is not None
        assert self.modulation is not None
        numbers = self.modulation(F.silu(self.out(self._features(time))))
        return Condition(norms=numbers.unflatten(-1, (4, -1)).movedim(1, 0).unsqueeze(2))

    def _features(self, time: Tensor) -> Tensor:
        if self.table is not None:
            return self.table[step_of(time, self.spec.steps)]
        assert self.hidden is not None
        features = sinusoidal_features(time, self.spec.width)
        return F.silu(self.hidden(features.to(self.hidden.weight.dtype)))
