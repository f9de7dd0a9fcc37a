"""Bottleneck adapters behind a sub-layer (Houlsby et al. 2019, arXiv 1902.00751), which PEFT lacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.model.linear import Linear


class Bottleneck(nn.Module):
    """h [..., d] -> what is added to it: up(gelu(down h)); 2 d m + d + m parameters. `up` starts at zero."""

    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        self.down = Linear(width, middle)
        self.up = Linear(middle, width)
        with torch.no_grad():
            for tensor in (self.down.bias, self.up.weight, self.up.bias):
                tensor.zero_()

    def forward(self, h: Tensor) -> Tensor:
        change: Tensor = self.up(F.gelu(self.down(h)))
        return change
