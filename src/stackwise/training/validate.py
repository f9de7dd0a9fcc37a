"""The held-out loss: summed over all targets, so that it does not depend on how rows are batched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stackwise.model.rack import Rack
from stackwise.objectives.causal import CausalLM
from stackwise.training.device import computing_in


@torch.no_grad()
def validate(
    rack: Rack,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    rows_per_chunk: int | None = None,
) -> tuple[float, int]:
    """Sum of the next-token losses (nats) over all batches, and the number of targets.

    Runs in eval mode and leaves every module in the mode it was in. `dtype` is the compute dtype (autocast).
    """
    modes = [(module, module.training) for module in rack.modules()]
    rack.eval()
    objective, total, count = CausalLM(), 0.0, 0
    try:
        for batch in batches:
            moved = {key: value.to(rack.device, non_blocking=True) for key, value in batch.items()}
            example = objective.corrupt(moved)
            with computing_in(dtype, rack.device):
                hidden = rack.forward_features(
                    example.input_ids,
                    example.attention_mask,
                    position_ids=example.position_ids,
                    document_ids=example.document_ids,
                )
                loss, weight = objective.loss(hidden, rack.head.matrix, example, rows_per_chunk)
            total += float(loss)
            count += int(weight)
    finally:
        for module, mode in modes:
            module.training = mode
    return total, count
