"""Feed-forward layers, all named `up`, `down` and, where there is a gate, `gate`.

Gated: down(act(gate x) * up x)   (Shazeer 2020, arXiv 2002.05202). Plain: down(act(up x)).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.model.block_spec import BlockSpec
from stackwise.model.linear import Linear
from stackwise.model.registry import FEED_FORWARDS


class GatedFeedForward(nn.Module):
    """down(act(gate x) * up x). With `freeze_up_proj`, `up` stays at its seeded start and never trains."""

    def __init__(self, spec: BlockSpec, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = Linear(spec.d_model, spec.d_ff, bias=spec.bias)
        self.up = Linear(spec.d_model, spec.d_ff, bias=spec.bias)
        self.down = Linear(spec.d_ff, spec.d_model, bias=spec.bias)
        self.activation = activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD))


class FeedForward(nn.Module):
    """down(act(up x))."""

    def __init__(self, spec: BlockSpec, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up = Linear(spec.d_model, spec.d_ff, bias=spec.bias)
        self.down = Linear(spec.d_ff, spec.d_model, bias=spec.bias)
        self.activation = activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BTD)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


_GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": _gelu_tanh}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": _relu_squared,
}
for _name, _activation in _GATED.items():
    FEED_FORWARDS.register(_name)(partial(GatedFeedForward, activation=_activation))
for _name, _activation in _PLAIN.items():
    FEED_FORWARDS.register(_name)(partial(FeedForward, activation=_activation))
