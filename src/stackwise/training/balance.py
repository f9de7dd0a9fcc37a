"""The share of routers in a training step: their losses, the offsets they move by, and how even the load is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stackwise.model.rack import Rack
from stackwise.model.router import Router, Visit, routed
from stackwise.objectives.base import Example
from stackwise.training.progress import Progress


class Balance:
    """Of one optimizer step. A rack without experts costs nothing.

    The losses of routers are divided by the real tokens of the whole step, as the loss is by its weight, so that they do
    not depend on how the step is cut into micro-batches.
    """

    def __init__(self, rack: Rack, examples: Sequence[Example], scaler: torch.amp.GradScaler | None) -> None:
        """`scaler`: scales the loss; null: it is not scaled."""
        self.rack = rack
        self.on = any(block.experts is not None for block in rack.spec.blocks)
        self.visits: list[Visit] = []
        if self.on:
            self.tokens = torch.stack([_tokens(example) for example in examples]).sum().clamp_min(1)
            self.scale = 1 / self.tokens if scaler is None else scaler.scale(1 / self.tokens)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around the forward pass of a micro-batch."""
        if not self.on:
            yield
            return
        with routed(self.rack, self.scale) as routing:
            yield
        self.visits += routing.visits

    def settle(self) -> None:
        """Move the offsets of the routers; to be called once, after the optimizer's step."""
        for router, counts in self._counts().items():
            router.move_bias(counts)

    def events(self, p: Progress) -> list[dict[str, Any]]:
        """An event of how even the load was: of the layers that train, each expert's choices over the mean (1 = even).

        `max_load` and `min_load`: the largest and smallest; `loss`: balancing and z-loss, weighted, per token. None where no router trained.
        """
        counts = list(self._counts().values())
        if not counts:
            return []
        loads = torch.cat([c / c.mean().clamp_min(1e-9) for c in counts])
        loss = torch.stack([visit.loss for visit in self.visits]).sum() / self.tokens
        most, least, per_token = torch.stack((loads.max(), loads.min(), loss.to(loads))).tolist()
        where = {"event": "experts", "step": p.step, "stage": p.stage}
        return [{**where, "max_load": most, "min_load": least, "loss": per_token}]

    def _counts(self) -> dict[Router, Tensor]:
        """Choices by expert, over the micro-batches."""
        total: dict[Router, Tensor] = {}
        for router, counts, _ in self.visits:
            total[router] = total[router] + counts if router in total else counts
        return total


def _tokens(example: Example) -> Tensor:
    ids, mask = example.input_ids, example.attention_mask
    return torch.tensor(float(ids.numel()), device=ids.device) if mask is None else mask.bool().sum().float()
