"""The objective `custom`: targets that come with the batch, and a loss function of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Self

from torch import Tensor

from stackwise.config.errors import ConfigError, Problem
from stackwise.objectives.base import IGNORE, Example, Noise, input_ids_of
from stackwise.objectives.head import head_loss

if TYPE_CHECKING:
    from stackwise.model.own_io import Head

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Custom:
    """Targets [B, T] are `targets` or `labels` of the batch, taken as they are, less those in padding and where
    `loss_mask` is 0.

    `loss_fn` (logits [n, V], targets [n]) -> losses [n]; null is cross-entropy. With it a batch may hold neither: its
    targets are then the inputs. Without it such a batch is a KeyError.
    """

    name = "custom"
    draws: int | None = 1

    def __init__(
        self, loss_fn: LossFunction | None = None, *, causal: bool = False, z_loss: float = 0.0
    ) -> None:
        self.loss_fn, self.causal, self.z_loss = loss_fn, causal, z_loss

    def corrupt(
        self, batch: Mapping[str, Tensor], noise: Noise | None = None, counts: Tensor | None = None
    ) -> Example:
        """Take the targets of the batch. A range of noise or counts are a ValueError."""
        if noise is not None or counts is not None:
            raise ValueError(
                "the custom objective corrupts nothing, so it takes no range of noise and no counts"
            )
        ids = input_ids_of(batch)
        key = next((name for name in ("targets", "labels") if name in batch), None)
        if key is None and self.loss_fn is None:
            raise KeyError(
                f"the batch has neither 'targets' nor 'labels', which the objective custom needs; it holds {sorted(batch)}"
            )
        labels = (ids if key is None else batch[key].long()).clone()
        if labels.shape != ids.shape:
            raise ValueError(f"{key} must be {list(ids.shape)} as input_ids are, not {list(labels.shape)}")
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        for kept in (mask, batch.get("loss_mask")):
            if kept is not None:
                labels.masked_fill_(~kept.bool(), IGNORE)
        return Example(
            ids,
            labels,
            mask,
            batch.get("position_ids"),
            batch.get("document_ids"),
            batch.get("sample_ids"),
            batch.get("token_type_ids"),
        )

    def embedded(self, x_BTD: Tensor, example: Example) -> Tensor:
        """The embeddings as they are."""
        return x_BTD

    def loss(
        self, hidden: Tensor, head: Head, example: Example, rows_per_chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Objective.loss`. With a `loss_fn` all logits of a micro-batch exist at once."""
        weight = self.weight(example)
        if self.loss_fn is None:
            return head_loss(hidden, head, example, z_loss=self.z_loss, rows_per_chunk=rows_per_chunk), weight
        scored = example.labels != IGNORE
        logits = head(hidden[scored]).float()
        losses = self.loss_fn(logits, example.labels[scored])
        if losses.shape != (len(logits),):
            raise ValueError(
                f"objective.loss_fn gave losses of shape {list(losses.shape)}, not [{len(logits)}]"
            )
        return losses.sum() + self.z_loss * logits.logsumexp(-1).square().sum(), weight

    def for_evaluation(self) -> Self:
        """The same; without the penalty on the normaliser."""
        return self if not self.z_loss else type(self)(self.loss_fn, causal=self.causal)

    def weight(self, example: Example) -> Tensor:
        """The number of targets."""
        return (example.labels != IGNORE).sum()


def load_function(name: str) -> LossFunction:
    """The function that `module:function` names; ConfigError where there is none."""
    key = "objective.loss_fn"
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(Problem(key, "does not name a function", name, "module:function"))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(Problem(key, f"cannot be imported ({error})", name, "module:function")) from None
    if not callable(found):
        raise ConfigError(Problem(key, "is not a function", name, "module:function"))
    return found
