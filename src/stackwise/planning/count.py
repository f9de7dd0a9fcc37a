"""All bytes of a stage: what it holds, and what comes and goes in a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from stackwise.kernels.linear_cross_entropy import chunk_rows
from stackwise.planning.held import held
from stackwise.planning.situation import Situation
from stackwise.planning.trace import HOST, LIVE, trace
from stackwise.planning.update import update_bytes


@dataclass(frozen=True)
class StageBytes:
    """Bytes of a stage on the device, but for `host`.

    `items` are those a run counts (`training.counting`), each at its most; `weights` are the parameters by format.
    `embedding_head`: weights, gradients and moments of embedding and head, which are in `items` too; `adapters` those
    of adapters. `boundaries` (streams between blocks) are part of the activations. `logits`: one chunk of them.
    `working`: what passes on top of the items, logits and unpacked matrices included. `peak`: the most alive at once;
    less than everything together where gradients come while activations go.
    """

    items: dict[str, int]
    weights: dict[str, int]
    embedding_head: int
    adapters: int
    boundaries: int
    logits: int
    working: int
    peak: int
    host: dict[str, int]

    @property
    def total(self) -> int:
        """The items together."""
        return sum(self.items.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "host_total": self.host_total}


def count_bytes(situation: Situation) -> StageBytes:
    """Count a stage."""
    own, step, settings = held(situation), trace(situation), situation.settings
    on_host = settings.state_device == "host"
    away = own.total("moments") - own.total("counters") if on_host else 0
    visiting = own.largest_moments if on_host else 0
    items = {
        "parameters": own.total("weight_bytes"),
        "gradients": step.most["gradients"],
        "moments": own.total("moments") - away + visiting,
        "activations": step.most["activations"],
        "buffers": step.most["buffers"],
    }
    always = items["parameters"] + items["moments"] - visiting
    peak = always + step.most[LIVE]
    if settings.memory != "fused":  # there a tensor's step is part of the backward pass
        update = update_bytes(own.updates, settings, situation.kind)
        peak = always + max(step.most[LIVE], own.total("gradients") + visiting + update)
    mapped = own.total("weight_bytes", host=True) - own.parked_trained if situation.frozen == "mapped" else 0

    def part(name: str) -> int:
        held_here = own.device[name]
        moments = held_here.counters if on_host else held_here.moments
        return held_here.weight_bytes + held_here.gradients + moments

    return StageBytes(
        items=items,
        weights=own.weights(),
        embedding_head=part("embedding") + part("head"),
        adapters=part("adapters"),
        boundaries=step.boundaries,
        logits=logits_bytes(situation),
        working=max(0, peak - sum(items.values())),
        peak=peak,
        host={
            "parameters": own.total("weight_bytes", host=True) - mapped,
            "mapped": mapped,
            "gradients": own.total("gradients", host=True),
            "moments": own.total("moments", host=True) + away,
            "boundaries": step.most[HOST],
        },
    )


def logits_bytes(situation: Situation) -> int:
    """One chunk of logits, in the dtype of the products."""
    dtype: torch.dtype = getattr(torch, situation.dtype)
    vocab = situation.spec.vocab_size
    rows = situation.loss_rows or chunk_rows(vocab, dtype, situation.kind)
    return min(rows, situation.tokens) * vocab * dtype.itemsize
