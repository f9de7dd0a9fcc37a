"""Muon: momentum, then the nearest semi-orthogonal matrix (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

Five steps of a quintic Newton-Schulz iteration in bf16 push the singular values of each momentum matrix towards 1.
Matrices of one shape go through the iteration together as one batch, which matters where matrices are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


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
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon takes matrices only, got a tensor of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, params in shapes.items():
                self._step_shape(shape, params, group)
        return loss

    def _step_shape(self, shape: tuple[int, ...], params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        update = torch.stack(buffers)
        if group["nesterov"]:
            update.lerp_(torch.stack(grads), 1 - group["momentum"])
        wide = shape[0] <= shape[1]
        update = orthogonalise(update if wide else update.mT, group["ns_steps"])
        update = (update if wide else update.mT).to(params[0].dtype)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        torch._foreach_add_(params, list(update.unbind()), alpha=-scale)
