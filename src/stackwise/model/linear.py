"""The linear layer of all blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from stackwise.kernels.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` whose product takes the fastest route (see `kernels.product`)."""

    rounding: Callable[[Tensor], Tensor] | None = None
    """What the matrix goes through before each product; see `precision.fake_quant`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.rounding is None else self.rounding(self.weight)
        return linear(x, weight, self.bias)
