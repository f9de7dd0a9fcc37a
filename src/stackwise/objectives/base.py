"""What an objective gives and takes. Shape letters: B batch, T positions, D model width, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stackwise.model.own_io import Head

IGNORE = -100
"""Label of a position that is not scored."""

Noise = tuple[float, float]
"""Range of the share of corrupted tokens: from the first, excluded, to the second, included."""


class Example(NamedTuple):
    """What a model reads and what it must say. Tensors are [B, T] where nothing else is said.

    `labels` are aligned with the positions: the hidden state at (b, t) is scored against labels[b, t], -100 = not
    scored. A field the batch does not have is null.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None
    sample_ids: Tensor | None = None
    """[B]"""
    token_types: Tensor | None = None
    draws: Tensor | None = None
    """[B]: which corruption of the sample this is; null: there is only one."""
    time: Tensor | None = None
    """float32 [B] in (0, 1]: the time of the noise, where the model is told."""
    rates: Tensor | None = None
    """float32 [B]: the share of noise of chosen embeddings, where embeddings are corrupted."""
    weights: Tensor | None = None
    """float32 [B]: weight of every scored position of the row; null: 1."""
    totals: Tensor | None = None
    """float32 [B]: what the row adds to the divisor; null: its scored positions."""
    scored: Tensor | None = None
    """int64 [n]: the scored positions, counted through all rows, and maybe some without a label; null: where labels are."""

    def rows(self, index: Tensor) -> Example:
        """Some rows, in the order given."""
        fields = {name: f[index.to(f.device)] for name, f in self._asdict().items() if f is not None}
        return Example(**{**fields, "scored": None})

    def to(self, device: torch.device) -> Example:
        """The same on a device."""
        moved = {n: f.to(device, non_blocking=True) for n, f in self._asdict().items() if f is not None}
        return Example(**moved)


class Objective(Protocol):
    """What is learned.

    `draws`: how many corruptions a sample has, which come again; null: each visit has its own.
    """

    name: str
    causal: bool
    draws: int | None

    def corrupt(
        self, batch: Mapping[str, Tensor], noise: Noise | None = None, counts: Tensor | None = None
    ) -> Example:
        """Corrupt the input and align the targets: a function of the seed, `sample_ids` and `draws` [B] alone.

        `noise`: range of the share of corrupted tokens, null: the objective's own. `counts` int64 [B]: exactly as
        many, instead. `draws` of the batch says how often each sample has been visited before, `places` its place in
        that pass. A batch without `input_ids` is a KeyError.
        """
        ...

    def embedded(self, x_BTD: Tensor, example: Example) -> Tensor:
        """The embeddings as the model shall see them."""
        ...

    def loss(
        self, hidden: Tensor, head: Head, example: Example, rows_per_chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, T, D] -> (loss_sum in nats, weight_sum).

        The head is applied in chunks of `rows_per_chunk` positions, so [B T, V] logits never exist; null keeps a
        chunk's logits under a fixed size.
        """
        ...

    def for_evaluation(self) -> Objective:
        """The objective that held-out text is measured with."""
        ...

    def weight(self, example: Example) -> Tensor:
        """The divisor of the loss, a scalar."""
        ...


def input_ids_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The ids int64 [B, T] of a batch; KeyError where there are none."""
    if "input_ids" not in batch:
        raise KeyError(f"the batch has no 'input_ids'; it holds {sorted(batch)}")
    return batch["input_ids"].long()
