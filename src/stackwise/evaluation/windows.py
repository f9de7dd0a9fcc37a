"""The windows of held-out text that hidden tokens are measured on, numbered the same in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import EvalLoader
from stackwise.model.rack import Rack

Batch = dict[str, Tensor]
Progress = Callable[[int, int], object]
"""Hears how much of a long measurement is done, and how much there is."""


def unseen(done: int, total: int) -> None:
    """The progress that nobody watches."""


def watched(batches: EvalLoader, progress: Progress) -> Iterator[Batch]:
    """The batches of a loader, once; `progress` hears of each when the next one is asked for."""
    for done, batch in enumerate(batches, 1):
        yield batch
        progress(done, len(batches))


def check_windows(rack: Rack, split: TokenSplit, seq_len: int) -> None:
    """ValueError for windows longer than the rack's `max_seq_len`, DataError for token ids that it does not know."""
    if not rack.spec.fits(seq_len):
        raise ValueError(
            f"windows of {seq_len} tokens are longer than the model's max_seq_len = {rack.spec.max_seq_len}"
        )
    split.check_vocabulary(rack.spec.vocab_size)


class Windows:
    """Windows of `seq_len` tokens, without overlap; `batches` limits them to `batches * batch_size`, spread evenly.

    `progress` hears of every batch of all `passes`. `packing`, `doc_mask` and `pad_id` are those of the training data. ValueErrors: windows longer than the rack's
    `max_seq_len`, token ids it does not know.
    """

    def __init__(
        self,
        rack: Rack,
        split: TokenSplit,
        *,
        seq_len: int,
        batch_size: int,
        batches: int | None = None,
        packing: bool = True,
        doc_mask: bool = True,
        pad_id: int | None = None,
        passes: int = 1,
        progress: Progress = unseen,
    ) -> None:
        check_windows(rack, split, seq_len)
        self.seq_len, self.passes, self._progress = seq_len, passes, progress
        self._loader = EvalLoader(
            split,
            seq_len=seq_len,
            batch_size=batch_size,
            batches=batches,
            packing=packing,
            doc_mask=doc_mask,
            pad_id=pad_id,
        )

    @property
    def count(self) -> int:
        return self._loader.rows

    def of_pass(self, number: int) -> Iterator[Batch]:
        """The batches, with the pass as `draws` [B] and the numbers of the windows as `places` [B]."""
        place = 0
        for done, batch in enumerate(self._loader, 1 + number * len(self._loader)):
            rows = len(batch["input_ids"])
            places = torch.arange(place, place + rows)
            place += rows
            yield {**batch, "draws": torch.full_like(places, number), "places": places}
            self._progress(done, self.passes * len(self._loader))
