"""The loss of a rack over a fixed list of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.objectives.causal import CausalLM


def validate(
    rack: Rack,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    objective: CausalLM | None = None,
    dtype: torch.dtype = torch.float32,
    rows_per_chunk: int | None = None,
) -> tuple[float, int]:
    """(sum of the negative log likelihoods in nats, number of scored tokens) over all batches.

    Batches are those of `data.packing`, on any device. `dtype` other than float32 runs under autocast; in float32
    the sum does not depend on how rows are batched, up to rounding. The rack runs in eval mode and is left as it was.
    Batches without a single target are a ValueError.
    """
    objective = objective or CausalLM()
    device = rack.device
    nll, tokens = 0.0, 0
    # no_grad and not inference_mode: what a module of the user's caches here must still serve training
    with (
        torch.no_grad(),
        eval_mode(rack),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        for batch in batches:
            example = objective.corrupt({name: tensor.to(device) for name, tensor in batch.items()})
            hidden = rack.forward_features(
                example.input_ids,
                example.attention_mask,
                position_ids=example.position_ids,
                document_ids=example.document_ids,
            )
            loss, weight = objective.loss(hidden, rack.head.matrix, example, rows_per_chunk)
            nll += float(loss)
            tokens += int(weight)
    if not tokens:
        raise ValueError("there is nothing to validate on: no batch has a token with a target")
    return nll, tokens
