"""Which experts a token visits, with what weights, and what keeps their use even.

    s = softmax(W x), or sigmoid(W x) for each expert        chosen = the k largest of s + b
    w = s of the chosen / their sum * scale

Softmax: Fedus et al. 2021 (Switch, arXiv 2101.03961), Jiang et al. 2024 (Mixtral, 2401.04088). Sigmoid, offsets b and
groups: DeepSeek-V3 (2412.19437). The router computes in fp32 (fp64 in an fp64 model), whatever autocast says, and its
matrix is neither quantised nor adapted: rounding would change which experts are chosen.

aux:   E sum_i f_i P_i of every row, f_i the share of its choices that fall on expert i, P_i the mean of s_i / sum s: 1
       where the load is even. Weighted by the row's tokens, so that how a step is cut into micro-batches does not matter
       (the sequence-wise loss of DeepSeek-V2, 2405.04434, eq. 17).
bias:  after every step b_i moves by `bias_rate` towards even use: up where expert i had fewer than the mean.
z:     (log sum exp W x)^2 of every token (Zoph et al. 2022, ST-MoE, 2202.08906).

Shape letters: B rows, T positions, D model width, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.model.expert_spec import ExpertSpec

if TYPE_CHECKING:
    from stackwise.model.rack import Rack


class Visit(NamedTuple):
    """What one router did in one forward pass.

    `counts` float32 [E]: choices that fell on each expert. `loss`: its balancing and z-loss, weighted, summed over tokens.
    """

    router: Router
    counts: Tensor
    loss: Tensor


class Routing:
    """What the routers of a training pass tell the loop; blocks append to it.

    Their losses send their gradients by themselves, times `scale`: on the way back through the chosen weights, so that
    it makes no difference whether a block is run once, computed again or streamed. Once `close`d, what is computed
    again is not appended again.
    """

    def __init__(self, scale: Tensor) -> None:
        """`scale` []: what a gradient of the losses' sum over tokens is multiplied by, such as 1 / tokens of the step."""
        self.scale = scale
        self.visits: list[Visit] = []
        self._open = True

    def add(self, visit: Visit) -> None:
        if self._open:
            self.visits.append(visit)

    def close(self) -> None:
        self._open = False


@contextmanager
def routed(rack: Rack, scale: Tensor | float) -> Iterator[Routing]:
    """Around the forward pass of a training step: the losses of routers that train send their gradients, times `scale`
    (1 / tokens of the step), with those of the loss, and are found in what this gives."""
    rack.routing = routing = Routing(torch.as_tensor(scale))
    try:
        yield routing
    finally:
        routing.close()
        rack.routing = None


class _Attach(torch.autograd.Function):
    """The weights as they are; backward, the loss has the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, scale, None


class Router(nn.Module):
    """x [B, T, D] -> weights [B, T, K] and the chosen experts int64 [B, T, K].

    `selection_bias` float32 [E] are the offsets under `balancing: bias`, a buffer that is saved with the weights.
    """

    selection_bias: Tensor | None

    def __init__(self, d_model: int, spec: ExpertSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_experts, d_model))
        offsets = torch.zeros(spec.n_experts) if spec.balancing == "bias" else None
        self.register_buffer("selection_bias", offsets)
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(
        self, x_BTD: Tensor, present: Tensor | None = None, routing: Routing | None = None
    ) -> tuple[Tensor, Tensor]:
        """`present` bool [B, T]: real tokens, null: all. `routing` is told where the router trains."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            dtype = torch.promote_types(x_BTD.dtype, torch.float32)
            logits = F.linear(x_BTD.to(dtype), self.weight.to(dtype))
            scores = logits.softmax(-1) if self.spec.router == "softmax" else logits.sigmoid()
            chosen = self._choose(scores.detach())
            weights = scores.gather(-1, chosen)
            if self.spec.normalise:
                weights = weights / (weights.sum(-1, keepdim=True) + torch.finfo(dtype).tiny)
            weights = weights * self.spec.scale
            if self.training and routing is not None:
                counts, loss = self._losses(logits, scores, chosen, present)
                weights = _Attach.apply(weights, loss, routing.scale.to(loss))
                routing.add(Visit(self, counts, loss.detach()))
        return weights, chosen

    @torch.no_grad()
    def _choose(self, scores: Tensor) -> Tensor:
        spec = self.spec
        if self.selection_bias is not None:
            scores = scores + self.selection_bias
        if spec.top_groups < spec.groups:
            grouped = scores.unflatten(-1, (spec.groups, -1))
            if spec.router == "softmax":  # DeepSeek-V2: a group is worth its best expert
                worth = grouped.amax(-1)
            else:  # DeepSeek-V3: its two best
                worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(worth).scatter_(-1, worth.topk(spec.top_groups, dim=-1).indices, 1.0)
            scores = grouped.masked_fill(kept.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
        return scores.topk(spec.top_k, dim=-1).indices

    def _losses(
        self, logits: Tensor, scores: Tensor, chosen: Tensor, present: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(choices by expert [E], the weighted losses summed over tokens)."""
        spec, real = self.spec, scores.new_ones(scores.shape[:-1])
        if present is not None:
            real = present.to(scores.dtype).expand_as(real)
        slots = real.unsqueeze(-1).expand(chosen.shape).flatten(1)
        counts_BE = scores.new_zeros(scores.shape[0], spec.n_experts)
        counts_BE = counts_BE.scatter_add(1, chosen.flatten(1), slots)
        loss = scores.new_zeros(())
        if spec.balancing == "aux" and spec.aux_weight:
            shares = scores if spec.router == "softmax" else scores / scores.sum(-1, keepdim=True)
            mass_BE = (shares * real.unsqueeze(-1)).sum(1)
            tokens = real.sum(1).clamp_min(1)
            by_row = (counts_BE * mass_BE).sum(1) / tokens * (spec.n_experts / spec.top_k)
            loss = loss + spec.aux_weight * by_row.sum()
        if spec.z_weight:
            loss = loss + spec.z_weight * (logits.logsumexp(-1).square() * real).sum()
        return counts_BE.sum(0).float(), loss

    @torch.no_grad()
    def move_bias(self, counts: Tensor) -> None:
        """Move the offsets after a step in which the experts were chosen so often; without offsets nothing."""
        if self.selection_bias is not None:
            towards = torch.sign(counts.mean() - counts).to(self.selection_bias)
            self.selection_bias += self.spec.bias_rate * towards
