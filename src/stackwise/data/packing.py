"""Rows of a token stream: which tokens sample i holds, and the batch made of some samples.

B rows, T positions. The sample id of a row is its number in the split: it never depends on order,
batch size, workers or ranks.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stackwise.data.corpus import TokenSplit
from stackwise.data.errors import DataError

Batch = dict[str, Tensor]
SampleIds = npt.NDArray[np.int64]

NO_TARGET = -100
"""Label of a position that has no target."""

GRAIN = 16
"""Widths of trimmed batches are multiples of this many tokens."""


class Rows(Protocol):
    """The samples of a split."""

    n_rows: int

    def batch(self, sample_ids: SampleIds) -> Batch:
        """The batch of these rows, in this order.

        input_ids int64 [B, T]; next_ids int64 [B], the token that follows each row and belongs to the
        same document, else -100; sample_ids int64 [B]. Only where needed: attention_mask bool [B, T]
        (False = padding), document_ids int32 [B, T] (rank of the document inside its row) and
        position_ids int64 [B, T] (from 0 again at each document). Of rows that overlap also context int64 [B]: how
        many of the first positions are there to be read and have no target.
        """


class PackedRows:
    """Row i is tokens [i·T, (i+1)·T) of the stream: full rows, documents one after the other.

    The token after a row is its last target, so every token but the first is a target once; a tail that
    does not fill a row is left out. With `doc_mask` rows that hold a document edge carry document and
    position ids, and no target crosses an edge; without it the split is one endless document.
    """

    def __init__(self, split: TokenSplit, seq_len: int, *, doc_mask: bool = True) -> None:
        split.check_documents()
        self.split, self.seq_len, self.doc_mask = split, seq_len, doc_mask
        self.n_rows = max(0, split.n_tokens - 1) // seq_len
        if not self.n_rows:
            raise _too_short(split, seq_len + 1)

    def batch(self, sample_ids: SampleIds) -> Batch:
        T, tokens = self.seq_len, self.split.tokens
        ids = tokens[: self.n_rows * T].reshape(self.n_rows, T)[sample_ids]
        next_ids = tokens[(sample_ids + 1) * T].astype(np.int64)
        self.split.check_batch(ids, sample_ids[:, None] * T + np.arange(T))
        self.split.check_batch(next_ids, (sample_ids + 1) * T)
        batch = {"input_ids": torch.from_numpy(ids.astype(np.int64))}
        if self.doc_mask:
            batch |= _documents(self.split, sample_ids * T, T, next_ids)
        batch["next_ids"] = torch.from_numpy(next_ids)
        batch["sample_ids"] = torch.from_numpy(sample_ids)
        return batch


class SlidingRows:
    """Rows of T tokens that begin every `stride` tokens: each target has T - stride tokens before it, or all there are.

    Every token of the split but the first is a target once: a row scores what no earlier one has, and the last row
    ends with the split, whatever its length. A split shorter than a row is one shorter row. `doc_mask` as in
    `PackedRows`. ValueError for a stride outside 1 to T; DataError for a split of less than two tokens.
    """

    def __init__(self, split: TokenSplit, seq_len: int, stride: int, *, doc_mask: bool = True) -> None:
        if not 1 <= stride <= seq_len:
            raise ValueError(f"stride is {stride}, but must be 1 to seq_len = {seq_len}")
        split.check_documents()
        if split.n_tokens < 2:
            raise _too_short(split, 2)
        self.split, self.doc_mask = split, doc_mask
        self.seq_len = min(seq_len, split.n_tokens - 1)
        last = split.n_tokens - 1 - self.seq_len
        self._starts = np.append(np.arange(0, last, stride), last).astype(np.int64)
        self._context = np.zeros_like(self._starts)
        self._context[1:] = self._starts[:-1] + self.seq_len - self._starts[1:]
        self.n_rows = len(self._starts)

    def batch(self, sample_ids: SampleIds) -> Batch:
        starts, T, tokens = self._starts[sample_ids], self.seq_len, self.split.tokens
        places = starts[:, None] + np.arange(T + 1)
        ids = tokens[places].astype(np.int64)
        self.split.check_batch(ids, places)
        next_ids = ids[:, T].copy()
        batch = {"input_ids": torch.from_numpy(ids[:, :T].copy())}
        if self.doc_mask:
            batch |= _documents(self.split, starts, T, next_ids)
        batch["next_ids"] = torch.from_numpy(next_ids)
        batch["context"] = torch.from_numpy(self._context[sample_ids])
        batch["sample_ids"] = torch.from_numpy(sample_ids)
        return batch


class PaddedRows:
    """Every row holds up to T tokens of one document, from its start on, padded on the right.

    A piece of a single token has no target inside its document and makes no row. Padding takes
    `pad_id`, or id 0 where the vocabulary has no padding token: nothing sees it either way. With `trim` a batch is as
    wide as its longest row, rounded up to a multiple of `GRAIN`, and T at most.
    """

    def __init__(
        self, split: TokenSplit, seq_len: int, *, pad_id: int | None = None, trim: bool = False
    ) -> None:
        split.check_documents()
        self.split, self.seq_len, self.pad_id, self.trim = split, seq_len, pad_id or 0, trim
        lengths = np.diff(split.doc_starts, append=split.n_tokens)
        pieces = -(-(lengths - 1) // seq_len)
        self.n_rows = int(pieces.sum())
        if not self.n_rows:
            raise _too_short(split, 2)
        piece = np.arange(self.n_rows) - np.repeat(pieces.cumsum() - pieces, pieces)
        self._start = np.repeat(split.doc_starts, pieces) + piece * seq_len
        self._end = np.repeat(split.doc_starts + lengths, pieces)

    @property
    def widths(self) -> SampleIds:
        """How wide a batch of each row alone is, [n_rows]."""
        lengths = np.minimum(self._end - self._start, self.seq_len)
        return np.minimum(-(-lengths // GRAIN) * GRAIN, self.seq_len)

    def batch(self, sample_ids: SampleIds) -> Batch:
        start, end = self._start[sample_ids], self._end[sample_ids]
        T, tokens = self.seq_len, self.split.tokens
        if self.trim:
            T = min(T, -(-int((end - start).max()) // GRAIN) * GRAIN)
        place = start[:, None] + np.arange(T)
        real = place < end[:, None]
        ids = tokens[np.minimum(place, len(tokens) - 1)].astype(np.int64)
        self.split.check_batch(ids, np.minimum(place, len(tokens) - 1))
        ids[~real] = self.pad_id
        follows = start + T
        next_ids = tokens[np.minimum(follows, len(tokens) - 1)].astype(np.int64)
        self.split.check_batch(next_ids, np.minimum(follows, len(tokens) - 1))
        next_ids[follows >= end] = NO_TARGET
        batch = {
            "input_ids": torch.from_numpy(ids),
            "next_ids": torch.from_numpy(next_ids),
            "sample_ids": torch.from_numpy(sample_ids),
        }
        if not real.all():
            batch["attention_mask"] = torch.from_numpy(real)
        return batch


def _documents(split: TokenSplit, starts: SampleIds, T: int, next_ids: SampleIds) -> Batch:
    """document_ids and position_ids of rows of T tokens from `starts` [B] on; empties `next_ids` at edges."""
    edges = split.doc_starts
    first = edges.searchsorted(starts, side="right")  # the first edge inside each row,
    last = edges.searchsorted(starts + T)  # the first one at or after its end
    follows = edges[np.minimum(last, len(edges) - 1)] == starts + T
    next_ids[follows] = NO_TARGET
    counts = last - first
    total = int(counts.sum())
    if not total:
        return {}
    # All edges of all rows at once: edge k of row b is edges[first[b] + k].
    row = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(total) - np.repeat(counts.cumsum() - counts, counts)
    column = edges[first[row] + within] - starts[row]
    documents = np.zeros((len(starts), T), np.int32)
    documents[row, column] = 1
    origin = np.zeros((len(starts), T), np.int64)
    origin[row, column] = column
    return {
        "document_ids": torch.from_numpy(documents.cumsum(axis=1, dtype=np.int32)),
        "position_ids": torch.from_numpy(np.arange(T) - np.maximum.accumulate(origin, axis=1)),
    }


def make_rows(
    split: TokenSplit,
    seq_len: int,
    *,
    packing: bool = True,
    doc_mask: bool = True,
    pad_id: int | None = None,
    trim: bool = False,
) -> PackedRows | PaddedRows:
    """The rows of a split, packed or padded. Raises: DataError when the split does not fill a row."""
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}, but a row holds at least 1 token")
    if packing:
        return PackedRows(split, seq_len, doc_mask=doc_mask)
    return PaddedRows(split, seq_len, pad_id=pad_id, trim=trim)


def _too_short(split: TokenSplit, needed: int) -> DataError:
    where: Any = split.folder / f"{split.name}.bin" if split.folder else ""
    if split.name == "text":  # of `read_corpus`, which knows no settings
        shorter, more = "--seq-len takes shorter windows", "a longer text"
    else:
        key = "data.path" if split.name == "train" else "data.eval_fraction or data.eval_path"
        shorter, more = "lower training.seq_len", f"more text through {key}"
    return DataError(
        f"the {split.name} split has {split.n_tokens} tokens and a row needs {needed} (context and next token)",
        where=str(where),
        hint=f"{shorter}, or give {more}" if needed > 2 else f"give {more}",
    )
