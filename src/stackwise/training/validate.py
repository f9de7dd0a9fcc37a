"""The held-out loss: summed over all targets, so that it does not depend on how rows are batched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.objectives.base import Noise, Objective
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.head import hidden_of
from stackwise.training.device import computing_in


# no_grad and not inference_mode: what a module of the user's caches here must still serve training
@torch.no_grad()
def validate(
    rack: Rack,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    objective: Objective | None = None,
    passes: int = 1,
    noise: Noise | None = None,
    dtype: torch.dtype = torch.float32,
    rows_per_chunk: int | None = None,
) -> tuple[float, int]:
    """Sum of the losses (nats) over all batches, and what it is divided by: for next tokens, the number of targets.

    `objective` null is next-token prediction. One that hides tokens hides others in each of `passes` passes, the same
    at every call; `noise`: over a range of the share of hidden ones.

    Batches are those of `data.packing`, on any device. Runs in eval mode and leaves every module in the mode it was
    in. `dtype` is the compute dtype (autocast); in float32 the sum does not depend on how rows are batched, up to
    rounding. Batches without a single target are a ValueError.
    """
    objective, total, count = (objective or CausalLM()).for_evaluation(), 0.0, 0
    with eval_mode(rack), computing_in(dtype, rack.device):
        for number in range(passes):
            place = 0
            for batch in batches:
                rows = len(batch["input_ids"])
                keys = {"places": torch.arange(place, place + rows), "draws": torch.full((rows,), number)}
                keys.setdefault("sample_ids", keys["places"])
                place += rows
                example = objective.corrupt({**keys, **batch, "draws": keys["draws"]}, noise).to(rack.device)
                hidden = hidden_of(rack, objective, example)
                loss, weight = objective.loss(hidden, rack.io.head, example, rows_per_chunk)
                total += float(loss)
                count += int(weight)
    if not count:
        raise ValueError("there is nothing to validate on: no batch has a token with a target")
    return total, count


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float | None:
    """Nats per token as bits per byte of a text of `n_tokens` and `n_bytes`; null when its bytes are not known (0)."""
    return nats_per_token * n_tokens / n_bytes / math.log(2) if n_bytes else None
