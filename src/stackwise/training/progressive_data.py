"""`ProgressiveDataLoader`: the batches of any loader, with the targets and masks of an objective."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor

from stackwise.objectives.base import IGNORE, Example, Noise, Objective, input_ids_of
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.masked import Masked
from stackwise.objectives.timesteps import TimeStepMasking


class ProgressiveDataLoader:
    """Wraps a loader of dict or tuple batches for the stack that is being trained.

    A dict batch needs `input_ids` [B, T]; a tuple batch is (input_ids,) or (input_ids, attention_mask).
    Each batch comes out as a dict that always holds

    - input_ids [B, T], corrupted; labels and targets [B, T] (the same, aligned with the positions, -100 where nothing
      is scored); attention_mask [B, T] or None, sample_ids [B] or None, and every other tensor of the batch that a
      model reads (`document_ids`, `position_ids`);
    - masks [B, T] bool (True = corrupted), masking_ids [n, 2], their row and position, and mask_ratio, their share of
      the tokens of the batch that may be corrupted;
    - time_step: int, the first one that the stack owns; float32 [B], the times of the noise, for a rack that is told
      them; None where there is no time;
    - stack_idx (the build index), training_objective, original_batch, and trunk_activations [B, T, D] or None.

    A causal objective adds clm_mask [T] (True where a next token is known) and combined_masks [B, T] (where it is
    scored).

    `masking_strategy` knows the noise of every stack and brings the objective of its configuration; else `objective`
    (null: clm) says what is learned. What is corrupted depends on the seed, `sample_ids` and `draws` [B]; batches
    without them are numbered by place and by pass of this loader, so that every pass corrupts anew.

    `trunk_activations` is called with the dict and gives the output of the frozen trunk, without gradient. With
    `cache_activations` it is called once per sample: later passes read its result from memory, which needs `sample_ids`
    in the batches, and one corruption for each sample (`objective.mask_draws: 1`).

    Raises: ValueError for a combination that means nothing, IndexError for a stack that the strategy does not know,
    ConfigError where no mask token is known; while iterating, KeyError for a batch without `input_ids`, TypeError or
    ValueError for a batch of another kind.
    """

    def __init__(
        self,
        base_dataloader: Iterable[Any],
        masking_strategy: TimeStepMasking | None = None,
        stack_idx: int = 0,
        trunk_activations: Callable[[Mapping[str, Any]], Tensor] | None = None,
        cache_activations: bool = False,
        *,
        objective: Objective | None = None,
    ) -> None:
        self._noise: Noise | None = None
        self._step: int | None = None
        if masking_strategy is not None:
            if objective is not None:
                raise ValueError(
                    f"masking_strategy brings its own objective, {masking_strategy.objective.name!r};"
                    f" leave out objective ({objective.name!r}), or the strategy"
                )
            objective = masking_strategy.objective
            if masking_strategy.interpretation == "depth":
                self._noise = masking_strategy.noise_of_stack(stack_idx)
                self._step = masking_strategy.get_time_step_for_stack(stack_idx)
        objective = objective or CausalLM()
        if isinstance(objective, Masked) and objective.corruption == "gaussian":
            raise ValueError("gaussian corruption adds noise to embeddings, and a loader has only ids")
        if cache_activations and trunk_activations is None:
            raise ValueError(
                "cache_activations is set without trunk_activations, so there is nothing to cache"
            )
        if cache_activations and objective.draws != 1:
            raise ValueError(
                "cache_activations is set, but a sample is corrupted differently in every pass;"
                " set objective.mask_draws to 1"
            )
        self.base_dataloader, self.stack_idx, self.objective = base_dataloader, stack_idx, objective
        self.masking_strategy = masking_strategy
        self.trunk_activations, self.cache_activations = trunk_activations, cache_activations
        self._cache: dict[int, Tensor] = {}
        self._hits = self._misses = self._passes = 0

    def __len__(self) -> int:
        """Batches in one pass. Raises: TypeError when the wrapped loader is endless."""
        return len(cast(Sized, self.base_dataloader))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, place = self._passes, 0
        self._passes += 1
        for original in self.base_dataloader:
            batch = self._prepare(original, number, place)
            place += len(batch["input_ids"])
            yield batch

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

    def _prepare(self, original: Any, number: int, place: int) -> dict[str, Any]:
        """The batch that begins at sample `place` of pass `number`."""
        given = as_dict(original)
        places = place + torch.arange(len(input_ids_of(given)))
        keys = {"sample_ids": places, "draws": torch.full_like(places, number), "places": places}
        example = self.objective.corrupt({**keys, **given}, self._noise)
        batch: dict[str, Any] = {
            **given,
            "input_ids": example.input_ids,
            "labels": example.labels,
            "targets": example.labels,
            **self._masks(given, example),
            "time_step": self._step if example.time is None else example.time,
            "stack_idx": self.stack_idx,
            "attention_mask": given.get("attention_mask"),
            "sample_ids": given.get("sample_ids"),
            "training_objective": self.objective.name,
            "original_batch": original,
        }
        if isinstance(self.objective, Masked) and self.objective.length_fraction:
            batch["attention_mask"] = example.attention_mask  # rows are cut short
        batch["trunk_activations"] = self._activations(batch)
        return batch

    def _masks(self, given: Mapping[str, Any], example: Example) -> dict[str, Any]:
        labels, objective = example.labels, self.objective
        masks, ratio, more = torch.zeros_like(labels, dtype=torch.bool), 0.0, {}
        if isinstance(objective, Masked):
            masks = objective.masks_of(example)
            clean = given["input_ids"].long()
            eligible = objective.eligible(clean, example.attention_mask, example.document_ids)
            ratio = float(masks.sum() / eligible.sum().clamp_min(1))
        elif isinstance(objective, CausalLM):
            known = torch.ones(labels.shape[1], dtype=torch.bool, device=labels.device)
            known[-1] = (labels[:, -1] != IGNORE).any()
            more = {"clm_mask": known, "combined_masks": labels != IGNORE}
        return {"masks": masks, "masking_ids": masks.nonzero(), "mask_ratio": ratio, **more}

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
