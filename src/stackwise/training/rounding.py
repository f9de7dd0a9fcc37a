"""Weights kept in bf16 without an fp32 master: updates round up or down by chance, so that small ones count on average.

bf16 holds eight binary digits. An update of less than half a step between two neighbours would be lost every time it
is rounded to the nearest; rounded at random, up with a probability equal to the distance from below, the expected
weight is the exact one (Gupta et al. 2015, arXiv 1502.02551; for bf16 training Zamirai et al. 2020, arXiv 2010.06192).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stackwise.model.init import keyed_generator


def round_stochastically(x_N: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 [N] -> bf16 [N], each number one of its two neighbours, equal to x on average. Overwrites x.

    Sixteen random bits are added below the last digit that bf16 keeps, and the rest is cut off.
    """
    words = torch.empty(-(-len(x_N) // 4), dtype=torch.int64, device=x_N.device)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: len(x_N)]  # -32768 .. 32767
    x_N.view(torch.int32).add_(bits).add_(32768).bitwise_and_(-65536)
    return x_N.to(torch.bfloat16)


class Rounding:
    """Random bits of a step's updates: they depend on the seed, the step and the parameter's name, and nothing else.

    The generator is the device's own, so a CPU and a GPU round differently. `step` is set by whoever counts steps.
    """

    def __init__(self, names: Mapping[Tensor, str], seed: int) -> None:
        self.names, self.seed, self.step = names, seed, 0

    def generator(self, parameter: Tensor) -> torch.Generator:
        """A fresh generator for the update of one parameter in this step."""
        key = keyed_generator(self.seed, "rounding", self.step, self.names[parameter])
        if parameter.device.type == "cpu":
            return key
        return torch.Generator(parameter.device).manual_seed(key.initial_seed())
