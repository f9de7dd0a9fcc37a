"""What all of this costs: time that training stands still, the speed of writing, and bytes."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from reliability.children import Spent, prepare_to_fork
from reliability.runs import text
from stackwise.checkpoint.store import Store
from stackwise.config.root import StackWiseConfig
from stackwise.tracking.metrics import read_metrics
from stackwise.training.run import train

EVERY = 100
"""Steps between two saves of the demo."""
BLOCKED, SPEED, BYTES = 0.01, 0.9, 0.25
"""What must be reached: at most this share of a step's time, at least this share of the disk's speed, at most this share
of the bytes of full saves."""


def run(megabytes: int, seed: int, *, disk: Path | None = None) -> dict[str, Any]:
    """All three on `disk`, by default the system's folder for temporary files; the record.

    `megabytes`: size of what the speed is measured with; below 64 the run of the demo is left out too, for nothing can be
    said of times there.
    """
    prepare_to_fork()
    spent = Spent()
    with tempfile.TemporaryDirectory(prefix="stackwise-cost-", dir=disk) as folder:
        place = Path(folder)
        found: dict[str, Any] = {"bytes": written_bytes(place)}
        if megabytes >= 64:
            found["blocked"] = blocked(place)
            found["speed"] = speed(place, megabytes, seed)
    failures = []
    again = f"python benchmarks/faults.py --only cost --megabytes {megabytes}"
    if found["bytes"]["share"] > BYTES:
        failures.append(
            f"bytes: {found['bytes']['share']:.3f} of full saves, {BYTES} at most; again: {again}"
        )
    if "blocked" in found and found["blocked"]["share"] > BLOCKED:
        failures.append(
            f"blocked: {found['blocked']['share']:.4f} of the time, {BLOCKED} at most; again: {again}"
        )
    if "speed" in found and found["speed"]["share"] < SPEED:
        failures.append(
            f"speed: {found['speed']['share']:.2f} of the disk's, {SPEED} at least; again: {again}"
        )
    return {"seed": seed, "asked": megabytes, **found, "failures": failures, **spent.since()}


def blocked(place: Path) -> dict[str, Any]:
    """The demo, saved every 100 steps: for what share of the training it stood still for that."""
    config = StackWiseConfig.from_yaml(
        "demo",
        [
            f"checkpoint.dir={place}",
            f"checkpoint.save_interval={EVERY}",
            f"data.cache_dir={place / 'tokens'}",
            f"training.progressive.cache_dir={place / 'cache'}",
        ],
    )
    outcome = train(config, sinks=[], report=False)
    events = read_metrics(Path(outcome["run_dir"])).events
    saves = [event for event in events if event["event"] == "checkpoint"]
    regular = [event for event in saves if event["step"] % EVERY == 0]
    # The time of training, without evaluating, sampling and saving; one save goes with so many steps.
    step = outcome["total_training_time"] / outcome["steps"]
    stood = statistics.mean(event["blocked_seconds"] for event in regular)
    return {
        "saves": len(regular),
        "step_seconds": step,
        "blocked_seconds": stood,
        "save_seconds": statistics.mean(event["seconds"] for event in regular),
        "bytes": max(event["bytes_total"] for event in saves),
        "share": stood / (EVERY * step),
    }


def speed(place: Path, megabytes: int, seed: int, rounds: int = 5) -> dict[str, Any]:
    """Bytes per second of a commit, against those of writing the same bytes to one file and syncing it."""
    generator = torch.Generator().manual_seed(seed)
    rates: dict[str, list[float]] = {"store": [], "plain": []}
    for number in range(rounds):
        parts = {
            f"stack:s{part}/weights": {
                f"w{n}": torch.randn(megabytes * 2**20 // 64, generator=generator) for n in range(4)
            }
            for part in range(4)
        }
        size = sum(t.nbytes for tensors in parts.values() for t in tensors.values())
        whole = [t.numpy().data.cast("B") for tensors in parts.values() for t in tensors.values()]
        for way in ("plain", "store") if number % 2 else ("store", "plain"):
            with _timed(rates[way], size):
                if way == "store":
                    Store(place / "store").commit(parts, {}, step=number)
                else:
                    _write(place / "plain.bin", whole)
        (place / "plain.bin").unlink()
    shutil.rmtree(place / "store")
    medians = {way: statistics.median(found) for way, found in rates.items()}
    return {"bytes": size, "rounds": rounds, **medians, "share": medians["store"] / medians["plain"]}


def _write(path: Path, chunks: list[memoryview]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _timed(rates: list[float], size: int) -> Iterator[None]:
    os.sync()  # what was written before is not counted
    begin = time.perf_counter()
    yield
    rates.append(size / (time.perf_counter() - begin))


def written_bytes(place: Path, stacks: int = 8) -> dict[str, Any]:
    """What an append run writes at the ends of its stages, against saving everything that it keeps there each time.

    The moments of all stacks are kept for the joint phase at the end, so both keep the same optimizer state.
    """
    source = place / "text.txt"
    source.write_text(text())
    keys: dict[str, Any] = {
        "model": {
            "d_model": 64,
            "n_heads": 2,
            "max_seq_len": 16,
            "architecture": {"n_stacks": stacks, "blocks_per_stack": 2},
        },
        "training": {
            "batch_size": 1,
            "seq_len": 8,
            "max_steps": 1,
            "dtype": "float32",
            "run_id": "bytes",
            "device": "cpu",
            "progressive": {
                "growth_optimizer": "carry",
                "joint_tuning": True,
                "global_head_blocks": 0,
                "cache_activations": False,
            },
        },
        "data": {
            "source": "text",
            "path": str(source),
            "tokenizer": "char",
            "cache_dir": str(place / "tokens"),
        },
        "checkpoint": {"dir": str(place), "save_interval": 1000, "keep_last": 20},
        "evaluation": {"batches": 1},
        "tracking": {"sample_interval": None},
        "generation": {"max_new_tokens": 1},
    }
    run_dir = Path(train(StackWiseConfig.from_dict(keys), sinks=[], report=False)["run_dir"])
    saves = [event for event in read_metrics(run_dir).events if event["event"] == "checkpoint"]
    stages = saves[:stacks]
    written = sum(event["bytes_written"] for event in stages)
    full = sum(event["bytes_total"] for event in stages)
    return {
        "stacks": stacks,
        "saves": len(stages),
        "written": written,
        "full": full,
        "share": written / full,
        "share_with_joint_phase": sum(event["bytes_written"] for event in saves)
        / sum(event["bytes_total"] for event in saves),
    }
