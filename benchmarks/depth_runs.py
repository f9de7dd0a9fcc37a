"""Runs of the benchmarks as run folders, so that a report can be made of them like of any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stackwise.checkpoint.store import Store
from stackwise.config.document import dump
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.stage import Stage
from stackwise.data.tokenizers import Tokenizer
from stackwise.model.rack import Rack
from stackwise.tracking.environment import peak_rss_bytes
from stackwise.tracking.events import Tracker
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import MetricsFile
from stackwise.training import state
from stackwise.training.changes import course_of
from stackwise.training.stored import OpenRun, open_run

Event = dict[str, Any]
Log = tuple[list[Stage], list[Event]]
COUNTED = ("tokens", "flops", "seconds")


def store_run(
    path: Path,
    config: StackWiseConfig,
    rack: Rack,
    tokenizer: Tokenizer,
    logs: list[Log],
    *,
    data: str,
    dtype: str,
    loss: float,
    label: str,
) -> OpenRun:
    """A run folder with the weights of a rack that is done and the events of the engines that trained it, one after
    the other. `data` is the hash of the corpus, `loss` the last held-out one."""
    folder = RunFolder.create(path, overwrite=True)
    folder.write_config(dump(config.to_dict()))
    folder.write_environment()
    tokenizer.save(folder.tokenizer)
    events, done = joined(logs)
    with Tracker([MetricsFile(folder.path)]) as tracker:
        tracker.emit(_start(config, rack, logs, events, dtype))
        for event in events:
            tracker.emit(event)
        last = next(event for event in reversed(events) if event["event"] == "stage_end")
        at = {"step": done["step"], "stage": last["stage"], **{name: done[name] for name in COUNTED}}
        final = {"event": "eval", "when": "final", "loss": loss, "perplexity": math.exp(loss), "label": label}
        tracker.emit({**final, "bits_per_byte": None, **at})
        parts = {f"{part}/weights": tensors for part, tensors in rack.parts().items()}
        meta = {
            "format": state.FORMAT,
            "rack": rack.spec.to_dict(),
            "config": course_of(config),
            "corpus": data,
            "tokenizer": tokenizer.hash,
        }
        commit = Store(folder.store).commit(parts, meta, step=done["step"], pin="final")
        size = sum(part.bytes for part in commit.parts.values())
        kept = {"event": "checkpoint", "commit": commit.id, "bytes_written": size, "bytes_total": size}
        tracker.emit(
            {**kept, "step": done["step"], "stage": last["stage"], "seconds": 0.0, "blocked_seconds": None}
        )
        ended = {"event": "run_end", "status": "done", "final_loss": loss, "peak_rss_bytes": peak_rss_bytes()}
        tracker.emit({**ended, "step": done["step"], **{name: done[name] for name in COUNTED}})
    return open_run(path)


def joined(logs: list[Log]) -> tuple[list[Event], dict[str, Any]]:
    """The events as if one engine had run all stages, and what they count up to."""
    found: list[Event] = []
    before: dict[str, Any] = {"step": 0, "stage": 0, **dict.fromkeys(COUNTED, 0)}
    for stages, events in logs:
        reached = dict(before)
        for event in events:
            moved = dict(event)
            for name in ("step", "stage"):
                if name in moved:
                    moved[name] += before[name]
            if event["event"] not in ("stage_end", "checkpoint"):
                for name in COUNTED:
                    if name in moved:
                        moved[name] += before[name]
            if event["event"] == "stage_end":
                for name in COUNTED:
                    reached[name] += event[name]
            found.append(moved)
        before = {**reached, "step": before["step"] + sum(s.steps for s in stages)}
        before["stage"] += len(stages)
    return found, before


def _start(config: StackWiseConfig, rack: Rack, logs: list[Log], events: list[Event], dtype: str) -> Event:
    starts = {event["stage"]: event for event in events if event["event"] == "stage_start"}
    listed = [stage for stages, _ in logs for stage in stages]
    names = ("name", "n_stacks", "steps", "params", "trainable_params")
    training = config.training
    return {
        "event": "run_start",
        "run_id": training.run_id,
        "stages": [
            {**{name: starts[i][name] for name in names}, "trains": list(stage.trains)}
            for i, stage in enumerate(listed)
        ],
        "total_steps": sum(stage.steps for stage in listed),
        "device": "cpu",
        "dtype": dtype,
        "n_params": rack.get_parameter_count(),
        "start_step": 0,
        "vocab_size": rack.spec.vocab_size,
        "seq_len": training.seq_len,
        "batch_tokens": training.batch_size * training.seq_len,
    }
