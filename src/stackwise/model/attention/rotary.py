"""The rotation factors of a forward pass, for every kind of attention that turns queries and keys.

Most ways of scaling give a position its angle for good, and the factors are looked up. Under dynamic and longrope
scaling the angles depend on the length of the row: that is the number of tokens of the sequence (document, padded row)
that a token belongs to, so that it does not matter what shares a batch with it; with a cache it is the number of tokens
that the cache was made for, since the keys in it are turned once.

Shape letters: B batch, T new tokens, W rotated numbers of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.kernels.rotary import rotary_table
from stackwise.model.rope_scaling import RopeScaling, frequencies

if TYPE_CHECKING:
    from stackwise.model.block import Context
    from stackwise.model.block_spec import BlockSpec


class Rotary:
    """Rotation of `width` numbers per head; `kernels.rotary.rotate` applies its factors."""

    def __init__(self, width: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self.width, self.theta, self.scaling = width, theta, scaling
        self.frequencies = frequencies(width, theta, scaling)
        self.magnitude = 1.0 if scaling is None else scaling.magnitude

    @classmethod
    def of(cls, spec: BlockSpec, width: int) -> Rotary | None:
        """That of a block for `width` numbers per head; null where nothing is rotated."""
        return None if spec.rope_theta is None else cls(width, spec.rope_theta, spec.rope_scaling)

    @property
    def depends_on_length(self) -> bool:
        return self.scaling is not None and self.scaling.depends_on_length

    def table(self, length: int, device: torch.device, wide: bool) -> Tensor:
        """Factors of positions 0 to `length` - 1: complex [length, W/2]. Only where they do not depend on the length."""
        return rotary_table(self.frequencies, self.magnitude, length, device, wide)

    def factors(self, context: Context, x_BTD: Tensor) -> Tensor:
        """Factors of the positions of this pass: [T, W/2], or [B or 1, T, W/2] where they differ by row."""
        wide, n_new = x_BTD.dtype == torch.float64, x_BTD.shape[1]
        past = context.visibility.past
        if self.depends_on_length:
            positions_BT = context.position_ids
            if positions_BT is None:
                positions_BT = torch.arange(past, past + n_new, device=x_BTD.device)[None]
            lengths = context.visibility.lengths(positions_BT)
            angles = positions_BT.unsqueeze(-1) * self._frequencies_at(lengths)
            turned = torch.polar(torch.full_like(angles, self.magnitude), angles)
            return turned.to(torch.complex128 if wide else torch.complex64)
        table = self.table(context.max_seq_len, x_BTD.device, wide)
        if context.position_ids is not None:
            return table[context.position_ids]
        return table[past : past + n_new]

    def _frequencies_at(self, lengths: Tensor) -> Tensor:
        """Angles per position in rows of these lengths: int64 [...] -> float64 [..., W/2]."""
        scaling = self.scaling
        assert scaling is not None
        trained = scaling.original_max_seq_len
        if scaling.type == "longrope":
            long = frequencies(self.width, self.theta, scaling, trained + 1)
            short_long = torch.tensor((self.frequencies, long), dtype=torch.float64, device=lengths.device)
            return short_long[(lengths > trained).long()]
        theta = scaling.base(self.theta, self.width, lengths.clamp_min(trained).double())
        pairs = torch.arange(0, self.width, 2, dtype=torch.float64, device=lengths.device)
        return theta.unsqueeze(-1) ** (-pairs / self.width)
