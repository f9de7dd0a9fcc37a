"""Adam with moments in eight bits, for fp32 weights and for bf16 weights without a master.

m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w = w - lr m' / (sqrt(v') + eps)   (m', v': bias corrected)

The moments are brought to fp32 for the update and stored in eight bits after it (Dettmers et al. 2021, arXiv
2110.02861). A tensor is updated in pieces, so that the fp32 numbers in between take little memory, and on a CPU stay
in its cache. Per parameter it holds 2 bytes, 8 more per block of 256, and a step counter of 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stackwise.training.eightbit import BLOCK, dequantise, dynamic_map, quantise, scale_count
from stackwise.training.rounding import Rounding, round_stochastically

PIECES = {"cpu": 2**18}
PIECES_ELSEWHERE = 2**23
KERNEL_DEVICES = {"cuda"}
"""Where bitsandbytes' kernel does the update of fp32 weights; on a CPU it takes three times as long as ours."""


def pieces(parameter: Tensor) -> Iterator[slice]:
    """The numbers of a parameter, some at a time; whole blocks but for the last."""
    size = PIECES.get(parameter.device.type, PIECES_ELSEWHERE)
    for start in range(0, parameter.numel(), size):
        yield slice(start, min(start + size, parameter.numel()))


def scales_of(part: slice) -> slice:
    """The scales of a piece."""
    return slice(part.start // BLOCK, scale_count(part.stop))


def working_bytes(numbers: int, dtype: torch.dtype, device: str, *, coupled: bool = False) -> int:
    """Bytes that the update of a tensor takes for a moment on a kind of device.

    Three fp32 numbers for each of a piece: both moments, and a root or the codes on their way to a moment. Two more
    where weight and gradient are bf16, else one where a decay is added to the gradient (`coupled`).
    """
    if device in KERNEL_DEVICES and dtype == torch.float32:
        return 4 * numbers if coupled else 0
    size = min(numbers, PIECES.get(device, PIECES_ELSEWHERE))
    fp32_numbers = 3 + (2 if dtype == torch.bfloat16 else coupled)
    return 4 * (fp32_numbers * size + scale_count(size))


@lru_cache(maxsize=1)
def bitsandbytes_update() -> Callable[..., None] | None:
    """bitsandbytes' update with 8-bit moments; null, with one warning, where it is not installed."""
    try:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise
    except ImportError:
        warnings.warn(
            "8-bit optimizers run faster on this device with bitsandbytes, which is not installed "
            '(pip install "stackwise[quant]"); PyTorch does the update',
            stacklevel=2,
        )
        return None
    update: Callable[..., None] = optimizer_update_8bit_blockwise
    return update


class Adam8bit(torch.optim.Optimizer):
    """AdamW, or with `decoupled` false Adam whose decay is part of the gradient. Parameters are contiguous.

    bf16 weights need `rounding`. State of a parameter: `step`; `exp_avg` and `exp_avg_sq`, uint8 in its shape;
    `exp_avg_scale` and `exp_avg_sq_scale`, fp32, one number per block.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.decoupled, self.rounding = decoupled, rounding
        for group in self.param_groups:
            for p in group["params"]:
                if not p.is_contiguous():
                    raise ValueError(f"8-bit moments need contiguous parameters, got strides {p.stride()}")
                if p.dtype not in (torch.float32, torch.bfloat16) or (
                    p.dtype == torch.bfloat16 and rounding is None
                ):
                    raise ValueError(
                        f"Adam8bit takes float32 weights, or bfloat16 with rounding; not {p.dtype}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, self.state[p] or self._start(p), group)
        return loss

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32)
        for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zero = int(dynamic_map(signed).abs().argmin())
            state[moment] = torch.full(p.shape, zero, dtype=torch.uint8, device=p.device)
            state[f"{moment}_scale"] = torch.zeros(
                scale_count(p.numel()), dtype=torch.float32, device=p.device
            )
        return state

    def _step_one(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] += 1
        decay = group["lr"] * group["weight_decay"]
        kernel = None
        if p.device.type in KERNEL_DEVICES and p.dtype == torch.float32:
            kernel = bitsandbytes_update()
        if kernel is not None:
            self._step_kernel(kernel, p, state, group, decay)
            return
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        size, root = group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5
        weights_N, grad_N = p.view(-1), p.grad.reshape(-1)  # type: ignore[union-attr]
        codes = [state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")]
        scales = [state[f"{name}_scale"] for name in ("exp_avg", "exp_avg_sq")]
        generator = None if p.dtype == torch.float32 else self.rounding.generator(p)  # type: ignore[union-attr]

        def update(part: slice) -> None:
            w, g, blocks = weights_N[part].float(), grad_N[part].float(), scales_of(part)
            if not self.decoupled and group["weight_decay"]:
                g = g.add(w, alpha=group["weight_decay"])
            m = dequantise(codes[0][part], scales[0][blocks], signed=True).lerp_(g, 1 - beta1)
            v = dequantise(codes[1][part], scales[1][blocks], signed=False)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if self.decoupled and decay:
                w.mul_(1 - decay)
            w.addcdiv_(m, v.sqrt().div_(root).add_(group["eps"]), value=-size)
            quantise(m, codes[0][part], scales[0][blocks], signed=True)
            quantise(v, codes[1][part], scales[1][blocks], signed=False)
            if generator is not None:
                weights_N[part] = round_stochastically(w, generator)

        for part in pieces(p):
            update(part)  # a call, so that the numbers of a piece are gone before the next

    def _step_kernel(
        self,
        kernel: Callable[..., None],
        p: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        decay: float,
    ) -> None:
        """The same by bitsandbytes. Decay is done here: its kernel would put it after the update, and never in g."""
        grad = p.grad
        if group["weight_decay"]:
            if self.decoupled:
                p.mul_(1 - decay)
            else:
                grad = grad.add(p, alpha=group["weight_decay"])  # type: ignore[union-attr]
        beta1, beta2 = group["betas"]
        maps = [_map_on(signed, p.device) for signed in (True, False)]
        kernel(
            "adam", grad.contiguous(), p, state["exp_avg"], state["exp_avg_sq"], beta1, beta2, 0.0, 0.0,  # type: ignore[union-attr]
            group["eps"], int(state["step"]), group["lr"], *maps,
            state["exp_avg_scale"], state["exp_avg_sq_scale"], weight_decay=0.0,
        )  # fmt: skip


@lru_cache(maxsize=8)
def _map_on(signed: bool, device: torch.device) -> Tensor:
    return dynamic_map(signed).to(device)
