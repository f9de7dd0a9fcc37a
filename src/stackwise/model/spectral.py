"""Spectral norm: layers that compute with W / sigma(W), sigma the largest singular value.

    sigma(W) = |W^T u|,   u by one power iteration per step        (Miyato et al. 2018, arXiv 1802.05957)

The iteration keeps the space of several vectors, U <- the orthonormal W W^T U, and u is the first singular vector
within it: a single vector lags behind for hundreds of steps where another singular value overtakes the largest. U is a
buffer that is saved with the weights, and a pass forward only reads it, so blocks that are run again in the backward
pass, and all micro-batches of a step, compute the same. The gradient takes u as constant: at the fixed point that is
the gradient of the largest singular value. A stack holds such layers while it trains; `fold_spectral_norm`
makes them plain ones that compute the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise.kernels.linear import linear
from stackwise.model.linear import Linear

if TYPE_CHECKING:
    from stackwise.model.block import Stack

VECTORS = 8
"""Vectors in the space."""
START_STEPS = 30
"""Iterations on a matrix that is new to a layer."""


def divided(weight: Tensor, space: Tensor) -> Tensor:
    """W / |W^T u| in W's dtype, u the first column of `space`."""
    with torch.autocast(weight.device.type, enabled=False):
        return weight / torch.linalg.vector_norm(space[:, 0] @ weight.to(space.dtype))


class SpectralLinear(Linear):
    """y = x (W / |W^T u|)^T + b.

    u is the first column of `space` [O, VECTORS or fewer]. Takes over the parameters of a plain layer; `restart` must
    follow.
    """

    space: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        vectors = min(VECTORS, layer.out_features, layer.in_features)
        self.register_buffer("space", layer.weight.new_zeros(layer.out_features, vectors, dtype=wide))
        self.train(layer.training)

    def normalised(self) -> Tensor:
        """The matrix that the layer computes with."""
        return divided(self.weight, self.space)

    def matrix(self) -> Tensor:
        weight = self.normalised()
        return weight if self.rounding is None else self.rounding(weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix(), self.bias)

    @torch.no_grad()
    def iterate(self, steps: int = 1) -> None:
        """Bring the space nearer to that of the largest singular values, and u to the first vector in it."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight, space = self.weight.to(self.space.dtype), self.space
            for _ in range(steps):
                space = torch.linalg.qr(weight @ (weight.t() @ space))[0]
            seen = space.t() @ weight
            self.space.copy_(space @ torch.linalg.eigh(seen @ seen.t())[1].flip(1))

    @torch.no_grad()
    def restart(self, first: Tensor) -> None:
        """Find the norm of a matrix that is new to it, from random vectors like `space`. All zeros: ValueError."""
        if not self.weight.any():
            raise ValueError(
                "a matrix of zeros cannot be brought to norm 1: a stack under model.spectral_norm cannot start as the "
                "identity"
            )
        self.space.copy_(first)
        self.iterate(START_STEPS)

    @torch.no_grad()
    def plain_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What `plain` would hold, new tensors."""
        held = {"weight": self.normalised(), **({} if self.bias is None else {"bias": self.bias.detach()})}
        return {prefix + name: tensor for name, tensor in held.items()}

    def plain(self) -> Linear:
        """A plain layer with the same parameters, W divided by its norm for good."""
        with torch.no_grad():
            self.weight.data.copy_(self.normalised())
        with torch.device("meta"):
            layer = Linear(1, 1, bias=False)
        layer.in_features, layer.out_features = self.in_features, self.out_features
        layer.weight, layer.bias, layer.rounding = self.weight, self.bias, self.rounding
        return layer.train(self.training)


def add_spectral_norm(stack: Stack) -> None:
    """Make the linear layers of a stack normalised ones, but for frozen up projections.

    Parameters and their names stay; `init.start_spectral_norm` must follow. Adapters on the stack: ValueError.
    """
    if stack.adapters:
        raise ValueError(
            f"stack {stack.uid!r} has adapters, which change its matrices behind the spectral norm; switch off "
            "model.spectral_norm, or training.progressive.qlora_enabled"
        )
    frozen = {
        ffn.up
        for block in stack.blocks
        if block.spec.freeze_up_proj  # type: ignore[union-attr]
        for ffn in block.feed_forwards()  # type: ignore[operator]
    }
    for parent, name, layer in _places(stack, Linear):
        if layer not in frozen:
            setattr(parent, name, SpectralLinear(layer))  # type: ignore[arg-type]
    stack.spectral = True


def fold_spectral_norm(stack: Stack) -> None:
    """Divide the matrices of a stack by their norms for good; what it computes stays, to the last bit."""
    for parent, name, layer in _places(stack, SpectralLinear):
        setattr(parent, name, layer.plain())  # type: ignore[operator]
    stack.spectral = False


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved tensors of a stack under the names of the plain one, its matrices divided by their norms."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(".space")}
    for name in tensors.keys() - plain.keys():
        matrix = f"{name.removesuffix('space')}weight"
        plain[matrix] = divided(tensors[matrix], tensors[name])
    return plain


def follow_weights(stacks: Iterable[Stack]) -> None:
    """One power iteration on every normalised matrix that trains: to be called once per step, before it."""
    for stack in stacks:
        if stack.spectral:
            for layer in stack.modules():
                if isinstance(layer, SpectralLinear) and layer.weight.requires_grad:
                    layer.iterate()


def _places(stack: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(stack.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                yield parent, name, child
