"""Keep the outputs of the frozen prefix, or compute them again: predicted cost, room, and the reason in words.

Per stage, with n distinct samples, v visits, e bytes per entry, c seconds to run the prefix on a sample, f seconds to
run only the blocks above the stored boundary below, of which a share b of the samples has an entry:

    computed at every visit    v c
    stored                     n (b f + (1 - b) c)  +  e (n + b n + v - n) / bandwidth

and what a later stage saves by going on from this boundary, n c, counts for storing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stackwise.model.flops import block_forward_flops
from stackwise.model.spec import RackSpec
from stackwise.trunk.layout import entry_bytes

Choice = Literal["auto"] | bool


@dataclass(frozen=True)
class Rates:
    """What the prediction reckons with: FLOP/s of the computation, bytes/s to and from memory and disk."""

    flops: float
    ram: float
    disk: float


NOMINAL = {
    "cpu": Rates(3e10, 4e9, 5e8),
    "cuda": Rates(1e14, 1e10, 2e9),
    "mps": Rates(2e12, 1e10, 2e9),
}
"""Cautious round figures by kind of device. They are fixed, so that the same run always decides the same."""


@dataclass(frozen=True)
class Work:
    """What a stage asks of its prefix. `samples` distinct samples in `visits` visits; FLOP per sample.

    `fill_flops` is the part above the boundary below (all of it without one), `below` the share of samples expected
    there. `later`: the share of samples with which the next stage goes on from this boundary.
    """

    samples: int
    visits: int
    entry_bytes: int
    prefix_flops: float
    fill_flops: float
    below: float = 0.0
    later: float = 0.0


def work_of(
    spec: RackSpec,
    blocks: int,
    *,
    seq_len: int,
    samples: int,
    visits: int,
    dtype: str,
    below_blocks: int = 0,
    below: float = 0.0,
    later: float = 0.0,
) -> Work:
    """The work of a stage whose prefix is the first `blocks` blocks; the store below lies after `below_blocks`."""
    flops = [block_forward_flops(block, seq_len) * seq_len for block in spec.blocks[:blocks]]
    size = entry_bytes((seq_len, spec.d_model), dtype)
    return Work(samples, visits, size, sum(flops), sum(flops[below_blocks:]), below, later)


@dataclass(frozen=True)
class Room:
    """Bytes free for new entries, and entries that the store holds already."""

    ram: int
    disk: int
    held: int = 0


@dataclass(frozen=True)
class Decision:
    """Whether to store, and why in one sentence. `warn`: somebody asked for it and does not get it."""

    use: bool
    reason: str
    predicted_bytes: int = 0
    recompute_seconds: float = 0.0
    store_seconds: float = 0.0
    warn: bool = False


def decide(choice: Choice, refusal: str | None, work: Work, room: Room, rates: Rates) -> Decision:
    """`choice` is the key cache_activations (or the stage's own), `refusal` what `legality` says.

    true stores wherever that is allowed; auto also asks for samples that come again (twice or more, or in a later
    stage, or in a store below), for room, and for less time than computing takes.
    """
    if choice is False:
        return Decision(False, "computed at every visit: cache_activations is false")
    if refusal is not None:
        return Decision(False, f"computed at every visit: {refusal}", warn=choice is True)
    need = max(0, work.samples - room.held) * work.entry_bytes
    total = work.samples * work.entry_bytes
    recompute = work.visits * work.prefix_flops / rates.flops
    store = store_seconds(work, room, rates)
    gain = recompute - store + work.later * work.samples * work.prefix_flops / rates.flops
    size, free = _bytes(total), _bytes(room.ram + room.disk)
    seen = work.visits / max(1, work.samples)

    def decision(use: bool, reason: str) -> Decision:
        how = "stored" if use else "computed at every visit"
        return Decision(use, f"{how}: {reason}", total, recompute, store)

    fits = need <= room.ram + room.disk
    if choice is True:
        rest = "" if fits else f"; there is room for {free}, the rest is computed at every visit"
        return decision(True, f"cache_activations is true, {size} for {work.samples:,} samples{rest}")
    if seen < 2 and not work.later and not work.below:
        often = "once" if seen == 1 else f"{seen:.2g} times"
        return decision(False, f"each sample comes {often} and no later stage goes on from here")
    if not fits:
        return decision(False, f"the outputs would take {_bytes(need)} and there is room for {free}")
    if gain <= 0:
        return decision(
            False, f"about {_seconds(recompute)}, and storing and reading {size} {_seconds(store)}"
        )
    again = f"each sample comes {seen:.2g} times"
    if seen < 2:
        again = "a later stage goes on from here" if work.later else "the boundary below is stored"
    return decision(True, f"{size}; {again}; about {_seconds(store)} instead of {_seconds(recompute)}")


def store_seconds(work: Work, room: Room, rates: Rates) -> float:
    """Predicted seconds of filling and reading the store over a stage."""
    total = work.samples * work.entry_bytes
    in_ram = min(1.0, room.ram / total) if total else 1.0
    per_byte = in_ram / rates.ram + (1 - in_ram) / rates.disk
    stored = work.samples * work.below
    flops = stored * work.fill_flops + (work.samples - stored) * work.prefix_flops
    moved = work.samples + stored + (work.visits - work.samples)
    return flops / rates.flops + moved * work.entry_bytes * per_byte


def overlap(
    first: tuple[int, int], second: tuple[int, int], n_samples: int, *, shuffled: bool = True
) -> float:
    """Expected share of the samples of `second` that are among those of `first`: (start, end) of a stream of epochs.

    Each epoch holds every sample once; when shuffled, in an order of its own, so that places in different epochs have
    nothing to do with one another.
    """
    hits = total = 0.0
    for epoch in range(second[0] // n_samples, -(-second[1] // n_samples)):
        own = _within(second, epoch, n_samples)
        missed = 1.0 - _shared(first, own) / max(1, own[1] - own[0])
        for other in range(first[0] // n_samples, -(-first[1] // n_samples)):
            held = _within(first, other, n_samples)
            if other == epoch:
                continue
            if shuffled:
                missed *= 1.0 - (held[1] - held[0]) / n_samples
            else:
                shift = (epoch - other) * n_samples
                moved = (held[0] + shift, held[1] + shift)
                missed = max(0.0, missed - _shared(moved, own) / max(1, own[1] - own[0]))
        hits += (1.0 - missed) * (own[1] - own[0])
        total += own[1] - own[0]
    return hits / total if total else 0.0


def _within(span: tuple[int, int], epoch: int, size: int) -> tuple[int, int]:
    return max(span[0], epoch * size), min(span[1], (epoch + 1) * size)


def _shared(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def _bytes(count: float) -> str:
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:.0f} B"


def _seconds(count: float) -> str:
    if count >= 5400:
        return f"{count / 3600:.3g} h"
    return f"{count:.3g} s" if count >= 0.1 else f"{count * 1000:.2g} ms"
