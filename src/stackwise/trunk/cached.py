"""The frozen prefix of a stage, read from the activation store where it is there and run where it is not.

Each stage's store is filled from the store below it: the boundary of an earlier stage with the same prefix so far.
Then a sample costs the stacks between the two boundaries once, and reading after that.

What comes out depends on the sample alone, never on what happened to be stored: outputs are rounded to the stored
format where they are computed, and again at the end of every stack on the way, since each may be the boundary of a
store below. In float32 nothing is rounded, and every value is what running the whole prefix gives. That is exact to
the bit as long as a row's outputs do not depend on the other rows of its batch. Matrix products and norms keep to
that; PyTorch's elementwise exponentials on the CPU differ in the last bit where a thread's share of a tensor ends
between two vector registers (number of threads no power of two, or T * d_ff no multiple of 16), and attention over
one row or with heads narrower than 16 where several threads share it. With one thread none of this was seen.

Shape letters: B rows, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.objectives.head import context_of
from stackwise.trunk.decide import NOMINAL, Choice, Decision, Rates, decide, work_of
from stackwise.trunk.keys import prefix_hashes, store_key
from stackwise.trunk.legality import CLM, Corruption, cache_refusal
from stackwise.trunk.manager import MemoryManager
from stackwise.trunk.store import ActivationStore

if TYPE_CHECKING:
    from stackwise.model.rack import Rack
    from stackwise.objectives.base import Example


class CachedPrefix:
    """Outputs [B, T, D] of the first `blocks` blocks, without gradient.

    `below` is the store after block `below_blocks`, which must be the end of a stack. `rows_run[i]` counts the rows
    that block i was run on.
    """

    def __init__(
        self,
        rack: Rack,
        blocks: int,
        store: ActivationStore,
        below: ActivationStore | None = None,
        below_blocks: int = 0,
    ) -> None:
        self.rack, self.blocks, self.store = rack, blocks, store
        self.below, self.below_blocks = below, below_blocks
        self._stops = [*(stop for stop in stack_ends(rack) if stop < blocks), blocks]
        assert below is None or below_blocks in self._stops[:-1]
        self.rows_run = [0] * blocks

    @torch.no_grad()
    def __call__(self, example: Example) -> Tensor:
        """Read, or run and store, the rows of a batch, whose `draws` say which corruption of a sample each is.

        Call it as the prefix would be run: autocast included. Raises ValueError for a batch without sample ids or of another length than the store's.
        """
        ids = example.sample_ids
        if ids is None:
            raise ValueError(
                "the batch has no sample_ids, so its activations cannot be stored; see cache_refusal"
            )
        if example.input_ids.shape[1] != self.store.shape[0]:
            raise ValueError(
                f"rows of {example.input_ids.shape[1]} tokens, but this store holds rows of {self.store.shape[0]}"
            )
        if example.draws is None:
            return self._of_draw(example, 0)
        draws = example.draws.cpu()
        listed = draws.unique().tolist()
        if len(listed) == 1:
            return self._of_draw(example, listed[0])
        rows = [(draws == draw).nonzero().squeeze(1) for draw in listed]
        parts = [self._of_draw(example.rows(row), draw) for row, draw in zip(rows, listed, strict=True)]
        joined = torch.cat(parts)
        return joined[torch.cat(rows).argsort().to(joined.device)]

    def _of_draw(self, example: Example, draw: int) -> Tensor:
        """Rows of one draw."""
        ids = example.sample_ids
        assert ids is not None
        rows = torch.arange(len(ids))
        known, x = self._take(self.store, ids, draw)
        parts = [(rows[known], x)] if x is not None else []
        rows = rows[~known]
        if self.below is not None and len(rows):
            known, x = self._take(self.below, ids[rows.to(ids.device)], draw)
            if x is not None:
                parts.append((rows[known], self._fill(example, rows[known], draw, x, self.below_blocks)))
            rows = rows[~known]
        if len(rows):
            parts.append((rows, self._fill(example, rows, draw)))
        if len(parts) == 1:
            return parts[0][1]
        order = torch.cat([which for which, _ in parts]).argsort()
        joined = torch.cat([x for _, x in parts])
        return joined[order.to(joined.device)]

    def prefetch(self, ids: Tensor, draw: int = 0) -> None:
        """Begin to read the rows of a later batch from disk, in the background."""
        known = self.store.has(ids, draw)
        self.store.prefetch(ids[known.to(ids.device)], draw)
        if self.below is not None:
            missing = ids[~known.to(ids.device)]
            self.below.prefetch(missing[self.below.has(missing, draw).to(ids.device)], draw)

    def _take(self, store: ActivationStore, ids: Tensor, draw: int) -> tuple[Tensor, Tensor | None]:
        """Which rows a store has (bool [B]), and those rows."""
        while True:
            known = store.has(ids, draw)
            if not known.any():
                return known, None
            x = store.read(ids[known.to(ids.device)], draw, self.rack.device)
            if x is not None:
                return known, x
            # a damaged entry was found, and is now missing

    def _fill(
        self, example: Example, rows: Tensor, draw: int, x_BTD: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Run some rows of the batch, from the boundary at `start` or the embedding on, and store what comes out."""
        part = example if len(rows) == len(example.input_ids) else example.rows(rows)
        assert part.sample_ids is not None
        context = context_of(self.rack, part)
        if x_BTD is None:
            x_BTD = self.rack.embed(part.input_ids, context)
        for stop in self._stops:
            if stop > start:
                x_BTD = self.rack.run(x_BTD, context, start, stop)
                for block in range(start, stop):
                    self.rows_run[block] += len(rows)
                start = stop
                if stop < self.blocks and self.store.dtype != "float32":
                    x_BTD = self.store.codec.round(x_BTD)
        if self.below is not None:
            self.below.discard(part.sample_ids, draw)  # the sample has moved up, and so does its memory
        return self.store.write(part.sample_ids, x_BTD, draw)


def open_prefix(
    manager: MemoryManager,
    rack: Rack,
    prefix: int,
    *,
    choice: Choice,
    identity: Mapping[str, str],
    n_samples: int | None,
    seq_len: int,
    visits: int,
    follows: float = 0.0,
    later: float = 0.0,
    corruption: Corruption = CLM,
    written_under: Corruption | None = None,
    rates: Rates | None = None,
    begun: bool | None = None,
) -> tuple[CachedPrefix | None, Decision]:
    """Decide whether a stage reads the outputs of its first `prefix` units from a store, and open it.

    `n_samples`: samples of the data set, null where batches carry no sample ids; `visits`: rows that the stage reads;
    `follows`: the share of its samples that the stage before has stored, `later`: the share with which the next one goes
    on from this boundary (see `overlap`; what is stored in fact does not decide, for a resumed run must decide the
    same); `identity`: see `keys.IDENTITY`; the rest as in
    `cache_refusal` and `decide`. `begun`: what was decided when the stage began; one that is taken up again keeps to it,
    since a rounded store gives other numbers than none. Stores of the manager that the stage does not need are removed: there are never more
    than its own and the one below.
    """
    blocks, choice = prefix - 1, choice if begun is None else begun
    refusal = cache_refusal(
        rack, prefix, corruption, written_under=written_under, has_sample_ids=n_samples is not None
    )
    shape, draws = (seq_len, rack.spec.d_model), corruption.draws or 1
    store: ActivationStore | None = None
    below: ActivationStore | None = None
    ends = [stop for stop in stack_ends(rack) if stop < blocks]
    # Where the stage before has stored; not where a store is found, which a resumed run may have lost with its memory.
    expected = ends[-1] if follows and ends else 0
    below_blocks = 0
    samples = 0 if n_samples is None else min(n_samples * draws, visits)
    if refusal is None and choice is not False:
        assert n_samples is not None
        identity = {**identity, "noise": str(corruption.noise)}
        hashes = prefix_hashes(rack, blocks)
        store = manager.open(store_key(hashes[blocks], blocks, identity), shape, n_samples, draws)
        for stop in reversed(ends):
            below = manager.find(store_key(hashes[stop], stop, identity), shape, n_samples, draws)
            if below is not None:
                below_blocks = stop
                break
    work = work_of(
        rack.spec,
        max(0, blocks),
        seq_len=seq_len,
        samples=samples,
        visits=visits,
        dtype=manager.dtype,
        below_blocks=expected,
        below=follows,
        later=later,
    )
    room = manager.room(store, below)
    decision = decide(choice, refusal, work, room, rates or NOMINAL[rack.device.type])
    if begun is not None:
        how = "stored" if decision.use else "computed at every visit"
        decision = replace(decision, reason=f"{how}, as when the stage began", warn=False)
    if not decision.use or store is None:
        manager.keep_only(below)
        return None, decision
    manager.keep_only(store, below)
    return CachedPrefix(rack, blocks, store, below, below_blocks), decision


def stack_ends(rack: Rack) -> list[int]:
    """The number of blocks up to the end of each stack."""
    ends = [0]
    for stack in rack.spec.stacks:
        ends.append(ends[-1] + len(stack.blocks))
    return ends[1:]
