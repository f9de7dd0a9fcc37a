"""The linear layer of all blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from stackwise.kernels.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` whose product takes the fastest route (see `kernels.product`)."""

    rounding: Callable[[Tensor], Tensor] | None = None
    """What the matrix goes through before each product; see `precision.fake_quant`."""

    def matrix(self) -> Tensor:
        """What the input is multiplied with, [O, I]."""
        return self.weight if self.rounding is None else self.rounding(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix(), self.bias)


def matrix_of(layer: nn.Module) -> Tensor | None:
    """The matrix that a layer in the place of a `Linear` computes with; null where it is more than a matrix."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    matrix: Callable[[], Tensor | None] | None = getattr(layer, "matrix", None)
    return None if matrix is None else matrix()
