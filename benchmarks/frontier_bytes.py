"""What the frontier measures beside quality: bytes against depth, and what the cascade of stored outputs saves."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from frontier_budget import Keys, config_of
from frontier_run import VERSION, Corpus, train
from frontier_scales import Scale, Setting
from frontier_variants import P, append_keys, whole_keys
from stackwise.planning.budget import run_flops
from stackwise.training.device import keep_freed_memory

SWEEPS: dict[str, Keys] = {
    "end to end": {P + "enabled": False},
    "end to end, streamed": {P + "enabled": False, "training.residency": "streamed"},
    "append": append_keys(),
    "append, streamed": append_keys(trunk_residency="streamed"),
    "append, streamed, cached": append_keys(trunk_residency="streamed", cache_activations=True),
    "prepend, streamed": whole_keys("prepend", trunk_residency="streamed"),
    "cyclic": whole_keys("cyclic", cycle_sweeps=1, cycle_steps=1),
    "cyclic, streamed": whole_keys("cyclic", cycle_sweeps=1, cycle_steps=1, trunk_residency="streamed"),
}
"""Curricula of the depth sweep, as changes of the base config. Every stage trains one step."""


@dataclass(frozen=True)
class Measurement:
    """`kind`: depth (bytes of one curriculum at one depth) or cascade (append with and without the store)."""

    kind: str
    label: str
    stacks: int
    corpus: Corpus
    keys: Keys
    flops: float

    @property
    def name(self) -> str:
        """The record's file name."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        words = "-".join(
            ["bytes", self.kind, self.label.replace(",", "").replace(" ", "_"), str(self.stacks)]
        )
        return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def measurements(scale: Scale, setting: Setting) -> Iterator[Measurement]:
    """The depth sweep over `scale.depths` and the cascade at `scale.cache_stacks`, with the model of `setting`."""
    few = Corpus(setting.corpus.name, rows=64, held_out=8)
    for stacks in scale.depths:
        for label, changes in SWEEPS.items():
            keys = {**_deep(setting, stacks), **changes, "training.max_steps": 1}
            yield Measurement("depth", label, stacks, few, keys, run_flops(config_of(keys), few.rows))
    rows = Corpus(setting.corpus.name, rows=scale.cache_rows, held_out=64)
    keys = {
        **_deep(setting, scale.cache_stacks),
        **append_keys(cache_dtype="float32"),
        "training.max_steps": scale.cache_steps,
        "training.dtype": "float32",
        "tracking.log_interval": 1,
    }
    cost = 2 * run_flops(config_of(keys), rows.rows)
    yield Measurement("cascade", "append", scale.cache_stacks, rows, keys, cost)


def _deep(setting: Setting, stacks: int) -> Keys:
    depth = {"model.architecture.n_stacks": stacks, P + "max_stacks": stacks}
    return {**setting.base, **depth, "training.seed": 1, "training.warmup_steps": 0}


def measure(what: Measurement) -> dict[str, Any]:
    """The record of a measurement."""
    torch.set_num_threads(1)
    keep_freed_memory()
    record = _cascade(what) if what.kind == "cascade" else _depth(what)
    return {"job": {**asdict(what), "name": what.name}, **record}


def _depth(what: Measurement) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = train(what.corpus, {**what.keys, P + "cache_dir": folder})
    peak = result["bytes"]["peak"]
    return {
        "bytes": result["bytes"],
        "outside_stacks": result["outside_stacks"],
        "cpu_seconds": result["cpu_seconds"],
        "line": f"{peak / 1e6:.2f} MB on the device",
    }


def _cascade(what: Measurement) -> dict[str, Any]:
    sides = {}
    for name, cached in (("recomputed", False), ("cached", True)):
        with tempfile.TemporaryDirectory() as folder:
            keys = {**what.keys, P + "cache_dir": folder, P + "cache_activations": cached}
            sides[name] = train(what.corpus, keys)
    seconds = {name: side["stage_cpu_seconds"] for name, side in sides.items()}
    ratio = sum(seconds["recomputed"]) / sum(seconds["cached"])
    return {
        "stage_cpu_seconds": seconds,
        "ratio": ratio,
        "steps": what.keys["training.max_steps"],
        "identical": sides["recomputed"]["train_losses"] == sides["cached"]["train_losses"],
        "losses_compared": len(sides["cached"]["train_losses"]),
        "final_losses": {name: side["loss"] for name, side in sides.items()},
        "cpu_seconds": sum(side["cpu_seconds"] for side in sides.values()),
        "line": f"recomputing takes {ratio:.2f} times the CPU seconds of the store",
    }
