"""MoRA: a change of high rank from one square matrix (Jiang et al. 2024, arXiv 2405.12130), which PEFT lacks.

For a layer [d, k] and rank r the matrix M is r^ x r^ with r^ = floor(sqrt((d + k) r)): no more parameters than LoRA's
(d + k) r, but a change whose rank is not bound by r. Two fixed operators go around it. compress cuts the input into
groups of r^ numbers and turns group j by R_j, the rotation of rotary positions; decompress puts the groups back side
by side. So the change is a block matrix:

    dW[j mod n_out, j mod n_in] = M R_j      for j < max(n_out, n_in),   n_in = ceil(k / r^), n_out = ceil(d / r^)

For d = k these are the blocks of the paper's rotation. Where one side is longer, its counterpart is used again under
further rotations, so that every input and every output takes part; the last group is cut to size. There is no factor
alpha / r, as in the paper.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.kernels.linear import linear

THETA = 10_000.0


class Mora(nn.Module):
    """x [..., k] -> change of the output [..., d]. Starts at zero."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.side = isqrt((in_features + out_features) * rank)
        self.n_in, self.n_out = -(-in_features // self.side), -(-out_features // self.side)
        self.groups = max(self.n_in, self.n_out)
        self.weight = nn.Parameter(torch.zeros(self.side, self.side))

    def forward(self, x: Tensor) -> Tensor:
        grouped = F.pad(x, (0, self.n_in * self.side - self.in_features)).unflatten(
            -1, (self.n_in, self.side)
        )
        if self.groups > self.n_in:
            grouped = grouped[..., torch.arange(self.groups, device=x.device) % self.n_in, :]
        turned = self._rotate(grouped, 1)
        if self.groups > self.n_out:  # groups that write to the same outputs are added before the product
            missing = -self.groups % self.n_out
            turned = F.pad(turned, (0, 0, 0, missing)).unflatten(-2, (-1, self.n_out)).sum(-3)
        return linear(turned, self.weight).flatten(-2)[..., : self.out_features]

    def delta_weight(self) -> Tensor:
        """The change of the weight, [d, k]."""
        side = self.side
        change = self.weight.new_zeros(self.n_out * side, self.n_in * side)
        turned = self._rotate(self.weight.unsqueeze(1).expand(-1, self.groups, -1), -1)
        for j in range(self.groups):
            row, column = j % self.n_out * side, j % self.n_in * side
            change[row : row + side, column : column + side] += turned[:, j]
        return change[: self.out_features, : self.in_features]

    def _rotate(self, grouped: Tensor, sign: int) -> Tensor:
        """Turn group j of [..., groups, r^] by j steps; coordinate i pairs with i + r^ // 2, an odd last one stays."""
        half = self.side // 2
        speed = THETA ** (-torch.arange(half, dtype=torch.float64, device=grouped.device) / max(1, half))
        angle = sign * torch.outer(
            torch.arange(self.groups, dtype=torch.float64, device=grouped.device), speed
        )
        cos, sin = angle.cos().to(grouped.dtype), angle.sin().to(grouped.dtype)
        first, second, rest = grouped.split((half, half, self.side - 2 * half), -1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), -1)
