"""Mixture of experts: a feed-forward of which each token visits a few of many copies.

    y = sum over the chosen experts of w_e FFN_e(x)  (+ FFN_shared(x))        the weights w are `model.router`'s

No token is dropped: tokens are sorted by expert, every expert multiplies its own, and the results return to where they
came from (MegaBlocks: Gale et al. 2022, arXiv 2211.15841). Shared experts (DeepSeekMoE: Dai et al. 2024, 2401.06066) are
one feed-forward of their joint width. Each expert is a feed-forward of its own with layers as anywhere else, so that
adapters, frozen formats, Muon, spectral norm, freezing and checkpoints know them; on an accelerator, in bf16, the
matrices of plain experts are put together for grouped products, which is when they would be cast to bf16 anyway.

Shape letters: N tokens, D model width, E experts, K chosen experts, S = N K slots sorted by expert, F expert width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from stackwise.kernels.product import new_shapes
from stackwise.kernels.rms_norm import compute_dtype
from stackwise.model.block_spec import BlockSpec
from stackwise.model.linear import Linear
from stackwise.model.registry import FEED_FORWARDS
from stackwise.model.router import Router

if TYPE_CHECKING:
    from stackwise.model.block import Context


class Experts(nn.Module):
    """x [B, T, D] -> the same; stands where a dense feed-forward does."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        moe = spec.experts
        assert moe is not None
        width, make = moe.width or spec.d_ff, FEED_FORWARDS.get(spec.ffn_type)
        one = replace(spec, d_ff=width, experts=None)
        self.router = Router(spec.d_model, moe)
        self.experts = nn.ModuleList(make(one) for _ in range(moe.n_experts))
        self.shared = make(replace(one, d_ff=moe.n_shared * width)) if moe.n_shared else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        weights, chosen = self.router(x_BTD, context.visibility.present, context.routing)
        y_ND = self.mix(x_BTD.flatten(0, -2), weights.flatten(0, -2), chosen.flatten(0, -2))
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def mix(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token, [N, D]."""
        order_S = chosen_NK.flatten().argsort(stable=True)
        place_NK = torch.empty_like(order_S).scatter_(
            0, order_S, torch.arange(order_S.numel(), device=order_S.device)
        )
        place_NK = place_NK.view(chosen_NK.shape)
        counts_E = chosen_NK.new_zeros(len(self.experts))
        counts_E.scatter_add_(0, chosen_NK.flatten(), torch.ones_like(order_S))
        source_S = order_S.div(chosen_NK.shape[1], rounding_mode="floor")
        x_SD = _Spread.apply(x_ND, source_S, place_NK)
        y_SD = self._grouped(x_SD, counts_E) if self._groups(x_SD) else self._one_by_one(x_SD, counts_E)
        return _Gather.apply(y_SD, weights_NK, source_S, place_NK).to(x_ND.dtype)

    def _one_by_one(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:
        """Every expert on its slots. One without slots runs too where it trains: its gradient is zero, not missing."""
        parts = x_SD.split(_sizes(counts_E, len(x_SD)))
        learning = torch.is_grad_enabled()
        with new_shapes():
            return torch.cat(
                [
                    expert(part)
                    for expert, part in zip(self.experts, parts, strict=True)
                    if len(part) or (learning and any(p.requires_grad for p in expert.parameters()))
                ]
            )

    def _groups(self, x_SD: Tensor) -> bool:
        """Whether all experts are plain enough, and the place such, that grouped products serve."""
        if x_SD.device.type != "cuda" or compute_dtype(x_SD) != torch.bfloat16:
            return False
        return can_group(self.experts)

    def _grouped(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:
        """The same by grouped products over the stacked matrices, in bf16."""
        ends = counts_E.cumsum(0).to(torch.int32)

        def product(x: Tensor, name: str) -> Tensor:
            weights = [getattr(expert, name).weight for expert in self.experts]
            stacked = torch.stack([w.to(torch.bfloat16) for w in weights])
            return F.grouped_mm(x, stacked.transpose(-2, -1), offs=ends)

        first: Any = self.experts[0]
        with torch.autocast(x_SD.device.type, enabled=False):
            x_SD = x_SD.to(torch.bfloat16)
            up = product(x_SD, "up")
            if hasattr(first, "gate"):
                inner = first.activation(product(x_SD, "gate")) * up
            else:
                inner = first.activation(up)
            return product(inner, "down")


def can_group(experts: nn.ModuleList) -> bool:
    """Whether the experts are built-in feed-forwards of plain layers without biases, of widths that grouped products take."""
    from stackwise.model.feed_forward import FeedForward, GatedFeedForward

    for expert in experts:
        if type(expert) not in (FeedForward, GatedFeedForward) or expert._forward_hooks:
            return False
        for layer in expert.children():
            if type(layer) is not Linear or layer.rounding is not None or layer.bias is not None:
                return False
            if layer._forward_hooks or layer.in_features % 8 or layer.out_features % 8:
                return False
    return True


def _sizes(counts_E: Tensor, n_slots: int) -> list[int]:
    """Slots of each expert; where tensors have no values, an even load."""
    if counts_E.is_meta or isinstance(counts_E, FakeTensor):
        n_experts = len(counts_E)
        return [(n_slots * (i + 1)) // n_experts - (n_slots * i) // n_experts for i in range(n_experts)]
    sizes: list[int] = counts_E.tolist()
    return sizes


class _Spread(torch.autograd.Function):
    """x [N, D] -> [S, D], every token at its slots. Backward sums the slots of a token in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, source_S: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, source_S)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        sum_ND = grad_SD.index_select(0, place_NK[:, 0])
        for k in range(1, place_NK.shape[1]):
            sum_ND += grad_SD.index_select(0, place_NK[:, k])
        return sum_ND, None, None


class _Gather(torch.autograd.Function):
    """y [S, D], weights [N, K] -> sum over k of weights[:, k] * y[place[:, k]], [N, D]."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, weights_NK: Tensor, source_S: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_SD, weights_NK, source_S, place_NK)
        weights_NK = weights_NK.to(y_SD.dtype)
        sum_ND = y_SD.index_select(0, place_NK[:, 0]).mul_(weights_NK[:, :1])
        for k in range(1, place_NK.shape[1]):
            sum_ND.addcmul_(y_SD.index_select(0, place_NK[:, k]), weights_NK[:, k : k + 1])
        return sum_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_SD, weights_NK, source_S, place_NK = ctx.saved_tensors
        grad_SD = grad_ND.index_select(0, source_S)
        products_S = (grad_SD * y_SD).sum(-1, dtype=weights_NK.dtype)
        by_slot = torch.empty_like(products_S)
        by_slot[place_NK.flatten()] = weights_NK.flatten()
        return grad_SD.mul_(by_slot.to(y_SD.dtype).unsqueeze(-1)), products_S[place_NK], None, None
