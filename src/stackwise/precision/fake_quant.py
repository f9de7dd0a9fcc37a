"""Training a stack on the rounded matrices that it will have once it is frozen.

y = x q(W)^T with q the frozen format's rounding; the gradient reaches W as if q were the identity (the straight-through
estimator, Bengio et al. 2013, arXiv 1308.3432). Freezing the stack then changes nothing that it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stackwise.model.block import Stack
from stackwise.model.linear import Linear
from stackwise.model.spectral import SpectralLinear
from stackwise.precision.base import Format
from stackwise.precision.convert import linear_layers
from stackwise.precision.formats import format_of


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, format: Format) -> Tensor:
        return format.round(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Rounding:
    """weight -> the values it would have in a format; gradients pass unchanged."""

    def __init__(self, format: str) -> None:
        self.format = format_of(format)

    def __call__(self, weight: Tensor) -> Tensor:
        rounded: Tensor = _RoundThrough.apply(weight, self.format)
        return rounded


def fake_quantise(stack: Stack, format: str | None) -> None:
    """From now on let the stack's trainable layers compute with matrices rounded to a format; null ends it.

    fp32 rounds nothing. Parameters, their names and their gradients stay what they are.
    """
    rounding = None if format in (None, "fp32") else Rounding(format or "")
    for layer in linear_layers(stack).values():
        if isinstance(layer, Linear) and type(layer) in (Linear, SpectralLinear):
            layer.rounding = rounding
