"""`ProgressiveDataLoader`: the batches of any loader, with the targets and masks of an objective."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor

from stackwise.kernels.linear_cross_entropy import IGNORE
from stackwise.objectives.causal import CausalLM


class ProgressiveDataLoader:
    """Wraps a loader of dict or tuple batches for the stack that is being trained.

    A dict batch needs `input_ids` [B, T]; a tuple batch is (input_ids,) or (input_ids, attention_mask).
    Each batch comes out as a dict that always holds

    - input_ids, labels and targets [B, T] (the same aligned labels), attention_mask [B, T] or None,
      sample_ids [B] or None, and every other tensor of the batch that a model reads (`document_ids`,
      `position_ids`);
    - masks [B, T] bool (True = corrupted) and masking_ids [n, 2], their row and position; the causal
      objective corrupts nothing, so its mask_ratio is 0 and its time_step None;
    - clm_mask [T] (True where a next token is known) and combined_masks [B, T] (where it is scored);
    - stack_idx, training_objective, original_batch, and trunk_activations [B, T, D] or None.

    `trunk_activations` is called with the dict and gives the output of the frozen trunk, without
    gradient. With `cache_activations` it is called once per sample: later passes read its result from
    memory, which needs `sample_ids` in the batches.

    Raises: ValueError for a combination that means nothing; while iterating, KeyError for a batch
    without `input_ids`, TypeError or ValueError for a batch of another kind.
    """

    def __init__(
        self,
        base_dataloader: Iterable[Any],
        masking_strategy: None = None,
        stack_idx: int = 0,
        trunk_activations: Callable[[Mapping[str, Any]], Tensor] | None = None,
        cache_activations: bool = False,
        *,
        objective: CausalLM | None = None,
    ) -> None:
        objective = objective or CausalLM()
        if objective.name != "clm":
            raise ValueError(f"the objective is {objective.name!r}; this loader makes the batches of 'clm'")
        if masking_strategy is not None:
            raise ValueError("masking_strategy is set, but the causal objective masks nothing; leave it out")
        if cache_activations and trunk_activations is None:
            raise ValueError(
                "cache_activations is set without trunk_activations, so there is nothing to cache"
            )
        self.base_dataloader, self.stack_idx, self.objective = base_dataloader, stack_idx, objective
        self.trunk_activations, self.cache_activations = trunk_activations, cache_activations
        self._cache: dict[int, Tensor] = {}
        self._hits = self._misses = 0

    def __len__(self) -> int:
        """Batches in one pass. Raises: TypeError when the wrapped loader is endless."""
        return len(cast(Sized, self.base_dataloader))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.base_dataloader:
            yield self._prepare(batch)

    def get_cached_activations(self, sample_ids: Iterable[int]) -> Tensor:
        """Cached trunk output of some samples, [n, T, D]. Raises: KeyError naming those not cached."""
        wanted = [int(i) for i in sample_ids]
        missing = [i for i in wanted if i not in self._cache]
        if missing:
            raise KeyError(f"no activations are cached for the samples {missing}")
        return torch.stack([self._cache[i] for i in wanted])

    def clear_cache(self) -> None:
        """Forget every cached activation; needed when the trunk has changed."""
        self._cache.clear()
        self._hits = self._misses = 0

    def cache_info(self) -> dict[str, int]:
        """Samples and bytes in the cache, and how often a sample was found in it or not."""
        return {
            "entries": len(self._cache),
            "bytes": sum(tensor.nbytes for tensor in self._cache.values()),
            "hits": self._hits,
            "misses": self._misses,
        }

    def _prepare(self, original: Any) -> dict[str, Any]:
        given = as_dict(original)
        example = self.objective.corrupt(given)
        labels = example.labels
        masks = torch.zeros_like(labels, dtype=torch.bool)
        known = torch.ones(labels.shape[1], dtype=torch.bool, device=labels.device)
        known[-1] = (labels[:, -1] != IGNORE).any()
        batch: dict[str, Any] = {
            **given,
            "input_ids": example.input_ids,
            "labels": labels,
            "targets": labels,
            "masks": masks,
            "masking_ids": masks.nonzero(),
            "time_step": None,
            "mask_ratio": 0.0,
            "clm_mask": known,
            "combined_masks": labels != IGNORE,
            "stack_idx": self.stack_idx,
            "attention_mask": given.get("attention_mask"),
            "sample_ids": given.get("sample_ids"),
            "training_objective": self.objective.name,
            "original_batch": original,
        }
        batch["trunk_activations"] = self._activations(batch)
        return batch

    @torch.no_grad()
    def _activations(self, batch: dict[str, Any]) -> Tensor | None:
        if self.trunk_activations is None:
            return None
        if not self.cache_activations:
            return self.trunk_activations(batch)
        if batch["sample_ids"] is None:
            raise ValueError("cache_activations needs 'sample_ids' in every batch, to know a sample again")
        ids = batch["sample_ids"].tolist()
        if all(i in self._cache for i in ids):
            self._hits += len(ids)
        else:
            self._misses += len(ids)
            for i, hidden in zip(ids, self.trunk_activations(batch), strict=True):
                self._cache[i] = hidden.clone()  # a view would keep the whole batch alive
        return self.get_cached_activations(ids)


def as_dict(batch: Any) -> dict[str, Any]:
    """A batch by name: a dict as it is, a tuple as (input_ids, attention_mask)."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if not isinstance(batch, tuple | list):
        raise TypeError(f"a batch is a {type(batch).__name__}, but must be a dict or a tuple of tensors")
    if len(batch) == 1:
        return {"input_ids": batch[0]}
    if (
        len(batch) == 2
        and batch[1].shape == batch[0].shape
        and bool(((batch[1] == 0) | (batch[1] == 1)).all())
    ):
        return {"input_ids": batch[0], "attention_mask": batch[1]}
    raise ValueError(
        f"a tuple batch of {len(batch)} is not (input_ids,) or (input_ids, attention_mask of 0 and 1);"
        " name its members in a dict"
    )
