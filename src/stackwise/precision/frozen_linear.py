"""A linear layer whose matrix is stored in a frozen weight format.

y = x W^T + b with W unpacked for this call alone, and once more when gradients come back: nothing but the packed
tensors, which are there anyway, is held between the two. dx = dy W; the matrix itself has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stackwise.kernels.product import product
from stackwise.kernels.rms_norm import compute_dtype
from stackwise.model.linear import Linear
from stackwise.precision.base import Format
from stackwise.precision.formats import format_of

WAYS_OUT = (
    "add adapters to its stack (training.progressive.qlora_enabled, or add_lora of the builder), or put its "
    "full-precision weights back first (restore_full_precision)"
)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        format: Format,
        names: tuple[str, ...],
        out: int,
        *packed: Tensor,
    ) -> Tensor:
        dtype = compute_dtype(x)
        ctx.format, ctx.names, ctx.shape, ctx.dtype = format, names, (out, x.shape[-1]), dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*packed)
        weight = format.dequantise(dict(zip(names, packed, strict=True)), ctx.shape, dtype)
        bias = bias if bias is None else bias.to(dtype)
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        return product(rows, weight, bias).view(*x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.format.dequantise(dict(zip(ctx.names, packed, strict=True)), ctx.shape, ctx.dtype)
            grad_x = product(rows, weight.t()).view(*grad.shape[:-1], ctx.shape[1])
        if ctx.needs_input_grad[1]:
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, *(None for _ in range(3 + len(packed)))


class FrozenLinear(Linear):
    """x [..., I] -> [..., O]; the matrix [O, I] is held as the buffers of its format, under their names.

    `weight` unpacks the matrix into fp32: a new tensor at every call, so writing into it changes nothing here; use
    `set_weight`. The bias stays a parameter. Casting the model leaves the packed tensors as they are, moving it moves
    them. The layer cannot be trained: `requires_grad_()` is a ValueError with the ways out.
    """

    def __init__(
        self, shape: tuple[int, int], format: str, tensors: Mapping[str, Tensor], bias: nn.Parameter | None
    ) -> None:
        nn.Module.__init__(self)  # not Linear's, which would make a dense matrix
        self.out_features, self.in_features = shape
        self.format = format_of(format)
        for name in self.format.layout(shape):
            self.register_buffer(name, tensors[name])
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, format: str) -> FrozenLinear:
        """The layer `linear` with its matrix quantised; the bias is shared."""
        shape = (linear.out_features, linear.in_features)
        return cls(shape, format, format_of(format).quantise(linear.weight), linear.bias)

    @classmethod
    def shaped_like(cls, linear: nn.Linear, format: str) -> FrozenLinear:
        """The layer that `of` would give, its packed tensors without values; on the same device."""
        shape = (linear.out_features, linear.in_features)
        return cls(shape, format, format_of(format).empty(shape, linear.weight.device), linear.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of the matrix."""
        return self.out_features, self.in_features

    def packed(self) -> dict[str, Tensor]:
        """The tensors that store the matrix."""
        return {name: self._buffers[name] for name in self.format.layout(self.shape)}  # type: ignore[misc]

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [O, I]."""
        return self.format.dequantise(self.packed(), self.shape, dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix [O, I] in fp32, unpacked anew."""
        return self.dequantised()

    def matrix(self) -> Tensor:
        return self.dequantised()

    def set_weight(self, weight: Tensor) -> None:
        """Quantise another matrix [O, I] into the packed tensors, in place."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the layer's matrix is {list(self.shape)}, got {list(weight.shape)}")
        held = self.packed()
        for name, tensor in self.format.quantise(weight).items():
            held[name].copy_(tensor)

    def dense(self, weight: Tensor | None = None) -> Linear:
        """A trainable layer with `weight` (null: the matrix as it is stored) in fp32; the bias is shared."""
        linear = Linear(self.in_features, self.out_features, bias=False, device="meta")
        values = self.dequantised() if weight is None else weight
        device = next(iter(self.packed().values())).device
        linear.weight = nn.Parameter(values.to(device, torch.float32, copy=weight is not None))
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed()
        return _FrozenProduct.apply(
            x, self.bias, self.format, tuple(packed), self.out_features, *packed.values()
        )

    def requires_grad_(self, requires_grad: bool = True) -> FrozenLinear:
        """Freezing is nothing new to it; thawing a ValueError."""
        if requires_grad:
            raise ValueError(f"a matrix stored as {self.format.name} cannot be trained by itself: {WAYS_OUT}")
        super().requires_grad_(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """What `to`, `half`, `cuda` ... do to a module's tensors; packed ones keep their dtype."""
        before = self.packed()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.format.name}"
