"""An endless stream over a finite loader of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from stackwise.training.progressive_data import as_dict


class CyclingLoader:
    """An endless stream over a finite loader of dict or tuple batches; its position is (epoch, batch).

    A tuple is read as (input_ids, attention_mask). Resuming skips batches already seen, which is exact when the
    loader gives the same batches in every pass.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.epoch = self.index = 0
        self._stream: Iterator[Mapping[str, Tensor]] | None = None

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return self

    def __next__(self) -> Mapping[str, Tensor]:
        if self._stream is None:
            self._stream = self._run()
        return next(self._stream)

    def _run(self) -> Iterator[Mapping[str, Tensor]]:
        skip = self.index
        while True:
            place = 0
            for i, batch in enumerate(self.batches):
                named = as_mapping(batch)
                rows = len(next(iter(named.values()))) if named else 0
                start, place = place, place + rows
                if i < skip:
                    continue
                self.index = i + 1
                yield self._keyed(named, start, rows)
            empty = place == 0
            if empty:
                raise ValueError("the data loader gives no batches")
            skip, self.index, self.epoch = 0, 0, self.epoch + 1

    def _keyed(self, batch: Mapping[str, Tensor], start: int, rows: int) -> Mapping[str, Tensor]:
        """The batch with what corruption is keyed by: the samples' ids (null: their places), pass and places."""
        places = torch.arange(start, start + rows)
        return {"sample_ids": places, **batch, "draws": torch.full_like(places, self.epoch), "places": places}

    def seek(self, batches: int) -> None:
        """Go to the batch that comes after `batches` of them from the very start."""
        count = len(self.batches) if isinstance(self.batches, Sized) else sum(1 for _ in self.batches)
        if count == 0:
            raise ValueError("the data loader gives no batches")
        self.load_state_dict({"epoch": batches // count, "index": batches % count})

    def skip(self, batches: int) -> None:
        """Leave out the next batches."""
        for _ in range(batches):
            next(self)

    def reshape(self, seq_len: int | None, batch_size: int | None) -> None:
        """Batches have the shape that the loader gives them; a stage that asks for another is a ValueError."""
        if seq_len is not None or batch_size is not None:
            raise ValueError(
                "a stage has a seq_len or batch_size of its own, but the batches come from your loader; "
                "remove them, or train with stackwise.train"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.index, self._stream = state["epoch"], state["index"], None


def as_mapping(batch: Any) -> Mapping[str, Tensor]:
    """The tensors of a dict or tuple batch by name."""
    return {key: value for key, value in as_dict(batch).items() if isinstance(value, Tensor)}
