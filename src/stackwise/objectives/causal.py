"""Causal language modelling: every position predicts the next token.

This is the one place of the project where labels are shifted; models, losses and evaluators never shift.
Shape letters: B batch, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stackwise.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy


class Example(NamedTuple):
    """What a model reads and what it must say. All tensors are [B, T], `sample_ids` is [B].

    `labels` are aligned with the positions: the hidden state at (b, t) is scored against labels[b, t], -100 = not
    scored. A field the batch does not have is null.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None
    sample_ids: Tensor | None = None


class CausalLM:
    """The objective `clm`: next-token prediction, divided by the number of valid targets."""

    name = "clm"

    def corrupt(self, batch: Mapping[str, Tensor]) -> Example:
        """Align the targets; the input stays as it is.

        The label of position t is token t + 1, that of the last position `next_ids` (or -100 without it). A label is
        -100 where either side of the step is padding, or where the two tokens belong to different documents.
        A batch without `input_ids` is a KeyError.
        """
        if "input_ids" not in batch:
            raise KeyError(f"the batch has no 'input_ids'; it holds {sorted(batch)}")
        ids = batch["input_ids"].long()
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
        return Example(ids, labels, mask, batch.get("position_ids"), documents, batch.get("sample_ids"))

    def loss(
        self, hidden: Tensor, head_matrix: Tensor, example: Example, rows_per_chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, T, D], head_matrix [V, D] -> (loss_sum in nats, weight_sum = number of scored positions).

        The head is applied in chunks of `rows_per_chunk` positions, so [B T, V] logits never exist; null keeps a
        chunk's logits under a fixed size.
        """
        labels = example.labels.flatten()
        total = linear_cross_entropy(hidden.flatten(0, 1), head_matrix, labels, rows_per_chunk=rows_per_chunk)
        return total, (labels != IGNORE).sum()
