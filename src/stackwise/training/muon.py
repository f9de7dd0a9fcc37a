"""Muon: momentum, then the nearest semi-orthogonal matrix (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

Five steps of a quintic Newton-Schulz iteration in bf16 push the singular values of each momentum matrix towards 1.
Matrices of one shape go through the iteration together as one batch, which matters where matrices are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from stackwise.training.eightbit import dequantise, dynamic_map, quantise, scale_count
from stackwise.training.rounding import Rounding, round_stochastically

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
BATCH_NUMBERS = 2**26  # numbers that go through the iteration together, unless a matrix has more


def orthogonalise(batch_KMN: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate U V^T of each matrix of the batch [K, M, N], M <= N; singular values end within about 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = batch_KMN.to(dtype)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(dtype) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """For matrices only; give everything else to AdamW. Decoupled weight decay, Nesterov momentum.

    The step of an [M, N] matrix is scaled by sqrt(max(1, M / N)), so that updates have a comparable size per output.
    With `eight_bit` the momentum is kept in eight bits (`momentum_buffer`, uint8, and `momentum_buffer_scale`); bf16
    weights need `rounding`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        *,
        eight_bit: bool = False,
        rounding: Rounding | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)
        self.eight_bit, self.rounding = eight_bit, rounding
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon takes matrices only, got a tensor of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for shape, params in _batches(group["params"]):
                self._step_batch(shape, params, group)
        return loss

    def _step_batch(self, shape: torch.Size, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad.to(torch.float32) for p in params if p.grad is not None]
        buffers = [self._momentum(p) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        update = torch.stack(buffers)
        if group["nesterov"]:
            update.lerp_(torch.stack(grads), 1 - group["momentum"])
        if self.eight_bit:
            for p, buffer in zip(params, buffers, strict=True):
                held = self.state[p]
                codes, scales = held["momentum_buffer"].view(-1), held["momentum_buffer_scale"]
                quantise(buffer.view(-1), codes, scales, signed=True)
        wide = shape[0] <= shape[1]
        update = orthogonalise(update if wide else update.mT, group["ns_steps"])
        updates = list((update if wide else update.mT).float().unbind())
        weights = [p if p.dtype == torch.float32 else p.float() for p in params]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        torch._foreach_add_(weights, updates, alpha=-scale)
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                generator = self.rounding.generator(p)  # type: ignore[union-attr]
                p.copy_(round_stochastically(weight.view(-1), generator).view(shape))

    def _momentum(self, p: Tensor) -> Tensor:
        """The momentum in fp32, from zero: the live tensor, or what its eight bits stand for."""
        held = self.state[p]
        if not self.eight_bit:
            if not held:
                held["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
            return held["momentum_buffer"]
        if not held:
            zero = int(dynamic_map(True).abs().argmin())
            held["momentum_buffer"] = torch.full(p.shape, zero, dtype=torch.uint8, device=p.device)
            held["momentum_buffer_scale"] = torch.zeros(
                scale_count(p.numel()), dtype=torch.float32, device=p.device
            )
        codes, scales = held["momentum_buffer"].view(-1), held["momentum_buffer_scale"]
        return dequantise(codes, scales, signed=True).view(p.shape)


def _batches(params: list[Tensor]) -> Iterator[tuple[torch.Size, list[Tensor]]]:
    """Parameters that have a gradient, by shape, at most BATCH_NUMBERS numbers at a time."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            shapes.setdefault(p.shape, []).append(p)
    for shape, alike in shapes.items():
        count = max(1, BATCH_NUMBERS // shape.numel())
        for start in range(0, len(alike), count):
            yield shape, alike[start : start + count]
