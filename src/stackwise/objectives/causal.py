"""Causal language modelling: every position predicts the next token.

This is the one place of the project where labels are shifted; models, losses and evaluators never shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from stackwise.objectives.base import IGNORE, Example, Noise, input_ids_of
from stackwise.objectives.head import head_loss

if TYPE_CHECKING:
    from stackwise.model.own_io import Head


class CausalLM:
    """The objective `clm`: next-token prediction, divided by the number of valid targets."""

    name = "clm"
    causal = True
    draws: int | None = 1

    def __init__(self, z_loss: float = 0.0) -> None:
        self.z_loss = z_loss

    def corrupt(
        self, batch: Mapping[str, Tensor], noise: Noise | None = None, counts: Tensor | None = None
    ) -> Example:
        """Align the targets; the input stays as it is.

        The label of position t is token t + 1, that of the last position `next_ids` (or -100 without it). A label is
        -100 where either side of the step is padding, where the two tokens belong to different documents, and in the
        first `context` [B] positions of a row.
        A batch without `input_ids` is a KeyError, a range of noise or a count a ValueError.
        """
        if noise is not None or counts is not None:
            raise ValueError(
                "the causal objective corrupts nothing, so it takes no range of noise and no counts"
            )
        ids = input_ids_of(batch)
        mask, documents = batch.get("attention_mask"), batch.get("document_ids")
        labels = torch.full_like(ids, IGNORE)
        labels[:, :-1] = ids[:, 1:]
        if "next_ids" in batch:
            labels[:, -1] = batch["next_ids"]
        if mask is not None:
            mask = mask.bool()
            labels.masked_fill_(~mask, IGNORE)
            labels[:, :-1].masked_fill_(~mask[:, 1:], IGNORE)
        if documents is not None:
            labels[:, :-1].masked_fill_(documents[:, 1:] != documents[:, :-1], IGNORE)
        if "context" in batch:
            places = torch.arange(ids.shape[1], device=ids.device)
            labels.masked_fill_(places < batch["context"][:, None], IGNORE)
        kinds = batch.get("token_type_ids")
        return Example(
            ids, labels, mask, batch.get("position_ids"), documents, batch.get("sample_ids"), kinds
        )

    def embedded(self, x_BTD: Tensor, example: Example) -> Tensor:
        """The embeddings as they are."""
        return x_BTD

    def loss(
        self, hidden: Tensor, head: Head, example: Example, rows_per_chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, T, D] -> (loss_sum in nats, weight_sum = number of scored positions)."""
        total = head_loss(hidden, head, example, z_loss=self.z_loss, rows_per_chunk=rows_per_chunk)
        return total, self.weight(example)

    def for_evaluation(self) -> Self:
        """The same; without the penalty on the normaliser."""
        return self if not self.z_loss else type(self)()

    def weight(self, example: Example) -> Tensor:
        """The number of scored positions."""
        return (example.labels != IGNORE).sum()
