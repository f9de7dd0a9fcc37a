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

    `fill_flops` is the part above the boundary below (all of it without one), `below` the share of samples stored
    there. `later`: another stage goes on from this boundary with the same samples.
    """

    samples: int
    visits: int
    entry_bytes: int
    prefix_flops: float
    fill_flops: float
    below: float = 0.0
    later: bool = False


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
    gain = recompute - store + (work.samples * work.prefix_flops / rates.flops if work.later else 0.0)
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
        return decision(False, f"each sample comes {seen:.2g} times and no later stage goes on from here")
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


def _bytes(count: float) -> str:
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:.0f} B"


def _seconds(count: float) -> str:
    if count >= 5400:
        return f"{count / 3600:.3g} h"
    return f"{count:.3g} s" if count >= 0.1 else f"{count * 1000:.2g} ms"
