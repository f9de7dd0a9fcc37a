"""A short convolution on the input of a sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stackwise.kernels.short_conv import short_conv
from stackwise.model.cache import BlockCache
from stackwise.model.visibility import Visibility


class ShortConv(nn.Module):
    """A weighted sum per channel over the last K tokens, or `both_ways` over the K around a token (K odd).

    It starts as the identity and never looks across a document's edge or at padding. `name` is where its last inputs are kept in a cache.
    """

    def __init__(self, d_model: int, width: int, name: str, both_ways: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, d_model))
        self.name, self.both_ways = name, both_ways

    def forward(self, x_BTD: Tensor, visibility: Visibility, cache: BlockCache | None = None) -> Tensor:
        if visibility.padding is not None:
            real = visibility.padding[:, visibility.past :, None]
            x_BTD = x_BTD.masked_fill(~real, 0.0)
        if cache is None:
            same = visibility.same_document(self.weight.shape[0])
            return short_conv(x_BTD, self.weight, same, both_ways=self.both_ways)
        seen = cache.extend(self.name, x_BTD, self.weight.shape[0] - 1)
        return short_conv(seen, self.weight)[:, -x_BTD.shape[1] :]
