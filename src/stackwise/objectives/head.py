"""An example through a rack, and through the head where it is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stackwise.kernels.linear_cross_entropy import linear_cross_entropy
from stackwise.objectives.base import Example, Objective

if TYPE_CHECKING:
    from stackwise.model.block import Context
    from stackwise.model.own_io import Head
    from stackwise.model.rack import Rack


def context_of(rack: Rack, example: Example) -> Context:
    """What all blocks share for this example."""
    return rack.make_context(
        example.input_ids,
        example.attention_mask,
        example.position_ids,
        example.document_ids,
        time_step=example.time,
        token_type_ids=example.token_types,
    )


def hidden_of(rack: Rack, objective: Objective, example: Example) -> Tensor:
    """What the head reads, [B, T, D]."""
    context = context_of(rack, example)
    x_BTD = objective.embedded(rack.embed(example.input_ids, context), example)
    hidden: Tensor = rack.io.norm(rack.run(x_BTD, context, *rack.span))
    return hidden


def head_loss(
    hidden: Tensor,
    head: Head,
    example: Example,
    *,
    banned: int | None = None,
    z_loss: float = 0.0,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """hidden [B, T, D] -> weighted sum of the losses in nats.

    Where an example names its scored positions, the head is applied to those alone.
    """
    rows, labels = hidden.flatten(0, 1), example.labels.flatten()
    weights = example.weights
    if example.scored is not None:
        rows, labels = rows[example.scored], labels[example.scored]
        weights = None if weights is None else weights[example.scored // hidden.shape[1]]
    elif weights is not None:
        weights = weights.repeat_interleave(hidden.shape[1])
    return linear_cross_entropy(
        head.inner(rows),
        head.matrix,
        labels,
        bias=head.bias,
        softcap=head.softcap,
        row_weights=weights,
        banned=banned,
        z_loss=z_loss,
        rows_per_chunk=rows_per_chunk,
    )
