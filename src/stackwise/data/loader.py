"""The order of samples, and the loaders that hand out batches of them.

The training stream is one endless sequence of sample ids: every epoch a permutation that depends on
(seed, epoch) alone, one epoch after the other. A position in that sequence is all there is to save.
"""

import atexit
import math
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stackwise.data.corpus import TokenSplit
from stackwise.data.errors import DataError
from stackwise.data.packing import Batch, PaddedRows, Rows, SampleIds, SlidingRows, make_rows

POOL = 4096
"""Samples among which rows of the same width are brought together."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
STOP_SIGNALS = tuple(signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))
"""Ask a run to stop. They reach the whole process group, and the training process answers for it."""


def permutation(n: int, seed: int, epoch: int) -> SampleIds:
    """A permutation of range(n), the same on every machine and in every release of numpy.

    The indices sorted by SplitMix64 (Steele, Lea and Flood 2014) keyed by seed and epoch.
    """
    key = _mix(_mix(np.array([seed & _MASK], np.uint64)) + np.uint64(epoch & _MASK))
    scores = _mix(np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + key)
    return scores.argsort(kind="stable").astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def by_width(order: SampleIds, widths: SampleIds, seed: int, epoch: int) -> SampleIds:
    """The same samples, so that neighbours are as wide: in each `POOL` of them, runs of one width.

    The order of the runs depends on (seed, epoch), and not on the batch size: a batch may hold the end of one run and
    the beginning of the next. widths [rows] by sample id.
    """
    parts = []
    for start in range(0, len(order), POOL):
        pool = order[start : start + POOL]
        kinds, kind = np.unique(widths[pool], return_inverse=True)
        turn = permutation(len(kinds), seed + start + 1, epoch)
        parts.append(pool[turn[kind].argsort(kind="stable")])
    return np.concatenate(parts)


class TokenLoader:
    """Endless batches of training rows; `iter` continues where the last batch ended.

    Each call hands out the next `batch_size · world_size` samples of the stream, of which rank r gets
    the r-th part: the ranks are disjoint, together they see each sample once per epoch, and a batch may
    run over the end of an epoch. Batches are as in `Rows.batch`; `num_workers` processes build them
    ahead of time and change nothing else. Neither the global random state nor the order of threads
    plays a part.

    Raises: DataError when the split does not fill a row; ValueError for a bad size or rank.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        packing: bool = True,
        doc_mask: bool = True,
        pad_id: int | None = None,
        bucketing: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_batch_size(batch_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, outside 0 to {world_size - 1}")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, but must be 0 or more")
        self._make = lambda length: make_rows(
            split, length, packing=packing, doc_mask=doc_mask, pad_id=pad_id, trim=bucketing
        )
        self._rows = self._make(seq_len)
        self._usual = (seq_len, batch_size)
        self.batch_size, self.seed, self.shuffle, self.bucketing = batch_size, seed, shuffle, bucketing
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        # The order means nothing for other rows, so a saved position names the rows it was made for.
        self._stream = {
            "rows": self._rows.n_rows,
            "seq_len": seq_len,
            "packing": packing,
            "seed": seed,
            "shuffle": shuffle,
            **({"bucketing": True} if bucketing else {}),
        }
        self._cursor = 0
        self._orders: dict[int, SampleIds] = {}
        self._ahead: _MultiProcessingDataLoaderIter | None = None

    @property
    def rows(self) -> int:
        """Samples in the split."""
        return self._rows.n_rows

    @property
    def rows_per_epoch(self) -> int:
        """Samples of one epoch, over all ranks: every row once."""
        return self._rows.n_rows

    @property
    def steps_per_epoch(self) -> int:
        """Batches per rank that cover every row at least once."""
        return math.ceil(self.rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.num_workers == 0:
            batch = self._rows.batch(self.sample_ids(self._cursor))
        else:
            if self._ahead is None:
                self._ahead = self._start_workers()
            try:
                batch = next(self._ahead)
            except (ConnectionError, EOFError) as error:  # torch's own message comes at other moments only
                raise RuntimeError(
                    "a process that builds batches has died, maybe for want of memory; "
                    "data.num_workers=0 builds them in the training process"
                ) from error
        batch |= self._times()
        # Counted when handed out: what the workers hold ahead of time is built again after a resume.
        self._cursor += self.batch_size * self.world_size
        return batch

    def upcoming(self) -> Batch:
        """sample_ids, draws and places of the batch that comes next, which is not built for it."""
        return {"sample_ids": torch.from_numpy(self.sample_ids(self._cursor)), **self._times()}

    def _times(self) -> Batch:
        """When each sample of the next batch comes, which corruption may depend on: pass, and place in it."""
        at = torch.arange(self.batch_size) + (self._cursor + self.rank * self.batch_size)
        return {"draws": at // self.rows, "places": at % self.rows}

    def sample_ids(self, cursor: int) -> SampleIds:
        """Ids [batch_size] of this rank's samples in the batch that begins at position `cursor` of the stream."""
        start = cursor + self.rank * self.batch_size
        parts = []
        while start < cursor + (self.rank + 1) * self.batch_size:
            epoch, at = divmod(start, self.rows)
            part = self._order(epoch)[at : at + cursor + (self.rank + 1) * self.batch_size - start]
            parts.append(part)
            start += len(part)
        return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)

    def _order(self, epoch: int) -> SampleIds:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch rarely touches more than two epochs
                self._orders.clear()
            order = permutation(self.rows, self.seed, epoch) if self.shuffle else np.arange(self.rows)
            if self.bucketing and isinstance(self._rows, PaddedRows):
                order = by_width(order, self._rows.widths, self.seed, epoch)
            self._orders[epoch] = order
        return self._orders[epoch]

    def seek(self, batches: int) -> None:
        """Go to the batch that follows the first `batches` of the stream."""
        self.close()
        self._cursor = batches * self.batch_size * self.world_size

    def skip(self, batches: int) -> None:
        """Leave out the next batches."""
        self.close()
        self._cursor += batches * self.batch_size * self.world_size

    def reshape(self, seq_len: int | None, batch_size: int | None) -> None:
        """Hand out rows of another length, or another number of them; null: what the loader was made with.

        Rows of another length are other samples in another order: the stream then goes on behind as many tokens as
        it has handed out. Raises: DataError when the split does not fill a row.
        """
        length, rows, held = seq_len or self._usual[0], batch_size or self._usual[1], self._stream["seq_len"]
        if (length, rows) == (held, self.batch_size):
            return
        self.close()
        self.batch_size = rows
        if length == held:
            return
        self._cursor = math.ceil(self._cursor * held / length)
        self._rows = self._make(length)
        self._stream |= {"rows": self._rows.n_rows, "seq_len": length}
        self._orders.clear()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, JSON-able: where the next batch begins, for all ranks."""
        return {"cursor": self._cursor, **self._stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, with any batch size, number of workers or ranks.

        Raises: DataError when the position belongs to other rows or another order.
        """
        unequal = [
            f"{key} was {state.get(key)!r} and is {self._stream.get(key)!r}"
            for key in {**self._stream, **state}
            if key != "cursor" and state.get(key) != self._stream.get(key)
        ]
        if unequal:
            raise DataError(
                f"the saved position belongs to another order of samples: {', '.join(unequal)}",
                hint="restore these settings and the same text, or start a new run",
            )
        self.close()
        self._cursor = int(state["cursor"])

    def close(self) -> None:
        """Stop the worker processes; the next batch starts them again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:  # dropping the name is not enough: a traceback may hold the iterator
            ahead._shutdown_workers()

    def _start_workers(self) -> _MultiProcessingDataLoaderIter:
        loader = DataLoader(
            _RowDataset(self._rows),
            sampler=_Upcoming(self, self._cursor),
            batch_size=None,  # the sampler names whole batches
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else every start would draw from the global random state
        )
        # A worker inherits the mask, so no signal reaches it before it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            ahead = _MultiProcessingDataLoaderIter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # The interpreter's own way to end workers at exit is SIGTERM, which they ignore: it would wait for ever.
        shutdown = weakref.WeakMethod(ahead._shutdown_workers)
        atexit.register(lambda: (shutdown() or _nothing)())
        return ahead


class EvalLoader:
    """One finite pass over the rows of a split, in order; the last batch may be smaller.

    With `batches` it covers `batches · batch_size` rows spread evenly over the split, with `n_rows` that many. With
    `stride` rows overlap, see `SlidingRows`; where `packing` is off they stop at documents all the same. Every pass
    gives the same batches. Raises: DataError when the split does not fill a row; ValueError for a bad size.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        batch_size: int,
        packing: bool = True,
        doc_mask: bool = True,
        pad_id: int | None = None,
        batches: int | None = None,
        stride: int | None = None,
        n_rows: int | None = None,
    ) -> None:
        _check_batch_size(batch_size)
        if batches is not None and batches < 1:
            raise ValueError(f"batches is {batches}, but an evaluation needs at least 1")
        if n_rows is not None and (n_rows < 1 or batches is not None):
            raise ValueError(f"n_rows is {n_rows} and batches {batches}: give one of them, at least 1")
        self._rows: Rows = (
            make_rows(split, seq_len, packing=packing, doc_mask=doc_mask, pad_id=pad_id)
            if stride is None
            else SlidingRows(split, seq_len, stride, doc_mask=doc_mask or not packing)
        )
        self.batch_size = batch_size
        rows = self._rows.n_rows
        wanted = n_rows if batches is None else batches * batch_size
        chosen = rows if wanted is None else min(rows, wanted)
        self._sample_ids = np.arange(chosen) * rows // chosen

    @property
    def rows(self) -> int:
        """Samples in one pass."""
        return len(self._sample_ids)

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.rows, self.batch_size):
            yield self._rows.batch(self._sample_ids[start : start + self.batch_size].copy())


class _RowDataset(Dataset[Batch]):
    """Batches by the sample ids they hold, for torch's workers."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, sample_ids: SampleIds) -> Batch:
        return self.rows.batch(sample_ids)


class _Upcoming(Sampler[SampleIds]):
    """The sample ids of every batch from a position of the stream on."""

    def __init__(self, loader: TokenLoader, cursor: int) -> None:
        self.loader, self.cursor = loader, cursor

    def __iter__(self) -> Iterator[SampleIds]:
        cursor = self.cursor
        while True:
            yield self.loader.sample_ids(cursor)
            cursor += self.loader.batch_size * self.loader.world_size


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch holds at least 1 row")


def _unchanged(batch: Any) -> Any:
    return batch


def _nothing() -> None:
    pass


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. Only the training process answers:
    # a worker killed by them would break its save. Workers end with `close`, or when their parent is gone.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
