"""The runs that faults are made in: small enough for a second, with every code path that holds state.

A run is named by a `Case`. What a run must come to is its `outcome_of`: all weights, moments, counters, the
position in the data and the events of metrics.jsonl, with everything left out that is a time; `digest` is its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from stackwise.checkpoint.store import Store
from stackwise.config.root import StackWiseConfig
from stackwise.tracking.metrics import read_metrics

P = "training.progressive."
TIMES = {"seconds", "stage_seconds", "time", "tokens_per_s", "rss_bytes", "peak_rss_bytes"}
"""Names of fields that differ between two runs of one config, wherever they stand."""
UNSETTLED = {"metrics_bytes", "metrics_sha256", "stored"}
"""What else may differ: size and hash of a file in which times are written, and what the activation caches hold and were asked
for, since a process that is killed loses the part in its memory, and computes it again."""
EVENTS = ("step", "eval", "stage_end", "sample")
"""Events of which a run that was stopped has each one once, like any other."""

BASE: dict[str, Any] = {
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.max_seq_len": 32,
    "model.dropout": 0.1,
    "model.architecture.n_stacks": 3,
    "model.architecture.blocks_per_stack": 1,
    "training.batch_size": 2,
    "training.seq_len": 16,
    "training.max_steps": 6,
    "training.seed": 5,
    "training.dtype": "float32",
    "training.device": "cpu",
    "training.optimizer.lr": 3e-3,
    P + "joint_tuning": True,
    P + "cache_activations": False,
    "data.source": "text",
    "data.tokenizer": "char",
    "checkpoint.save_interval": 1,
    "checkpoint.keep_last": 2,
    "evaluation.batches": 1,
    "tracking.log_interval": 1,
    "tracking.sample_interval": None,
    "tracking.report": False,
    "generation.max_new_tokens": 1,
}


@dataclass(frozen=True)
class Case:
    """A run by its difference to `BASE`. `says`: what is particular about what it must not lose. `besides`: further fields
    that may differ between two of its runs."""

    name: str
    says: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    besides: frozenset[str] = frozenset()


CASES = (
    Case("append", "frozen trunk, then all together", {P + "growth_optimizer": "carry"}),
    Case(
        "append, stored trunk",
        "outputs of the frozen trunk kept on disk",
        {P + "cache_activations": True, P + "cache_ram_bytes": 4000, "model.dropout": 0.0},
        # a step that is done again finds what was stored, and so costs less
        frozenset({"flops", "stage_flops"}),
    ),
    Case("prepend", "new stacks next to the embedding", {P + "building_mode": "prepend"}),
    Case(
        "end to end",
        "one stage, two micro-batches to a step, a save every second step",
        {
            P + "enabled": False,
            "training.gradient_accumulation_steps": 2,
            "training.max_steps": 8,
            "checkpoint.save_interval": 2,
        },
    ),
    Case(
        "cyclic",
        "moments of stacks that rest",
        {P + "building_mode": "cyclic", P + "growth_optimizer": "carry", P + "cycle_steps": 3},
    ),
    Case(
        "masked diffusion",
        "masks and times drawn by sample",
        {P + "training_objective": "diffusion", "checkpoint.save_interval": 2},
    ),
    Case(
        "adapters over nf4",
        "a trunk in 4 bits with adapters, and the full-precision weights of before",
        {
            P + "trunk_precision": "nf4",
            P + "trunk_strategy": "qlora",
            P + "qlora_enabled": True,
            P + "progressive_qlora": True,
            P + "qlora_rank": 2,
            P + "progressive_qlora_rank": 2,
            P + "qlora_lr": 1e-3,
            P + "joint_tuning": False,
        },
    ),
    Case(
        "Muon",
        "two optimizers, a save every second step",
        {"training.optimizer.optimizer_type": "Muon", "checkpoint.save_interval": 2},
    ),
)
BY_NAME = {case.name: case for case in CASES}


def text(characters: int = 1500) -> str:
    """Words in an order that no one has written, always the same."""
    draw = random.Random(1)
    words = ("the", "stack", "that", "grows", "on", "a", "frozen", "trunk", "holds", "what", "it", "learned")
    made = ""
    while len(made) < characters:
        made += draw.choice(words) + draw.choice("  \n")
    return made


def config_of(case: Case, folder: Path, data: Path, run_id: str = "run", **changes: Any) -> StackWiseConfig:
    """The case as a run below `folder`; `data` holds the text and its tokens, for all runs."""
    source = data / "text.txt"
    if not source.exists():
        source.write_text(text())
    keys = {
        **BASE,
        **case.keys,
        "training.run_id": run_id,
        "data.path": str(source),
        "data.cache_dir": str(data / "tokens"),
        "checkpoint.dir": str(folder),
        P + "cache_dir": str(folder / "cache"),
        **changes,
    }
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        level = nested
        *sections, name = key.split(".")
        for section in sections:
            level = level.setdefault(section, {})
        level[name] = value
    return StackWiseConfig.from_dict(nested)


def outcome_of(run_dir: Path, case: Case) -> dict[str, Any]:
    """All that a finished run of this case has come to, without times; tensors by their hash.

    Raises CheckpointError or MetricsError where it cannot be read, and AssertionError where a step is there twice, or
    the run has not come to its end.
    """
    state, events = state_of(run_dir), events_of(run_dir)
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == sorted(set(steps)), f"steps in metrics.jsonl: {steps}"
    return without({**state, "events": events}, TIMES | UNSETTLED | case.besides)


def digest(outcome: dict[str, Any]) -> str:
    """SHA-256 over an outcome."""
    return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()


def differences(found: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """What two outcomes differ in: the place, what was found and what was wanted."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from differences(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            yield from differences(*pair, f"{where}[{index}]")
    elif found != wanted and not (found != found and wanted != wanted):  # NaN is like NaN
        yield f"{where}: {found!r:.80} in place of {wanted!r:.80}"


def state_of(run_dir: Path, commit_id: str | None = None) -> dict[str, Any]:
    """Hashes of all tensors of a commit (the newest), with its counters."""
    store = Store(run_dir / "store")
    commit = store.latest()
    if commit_id is not None:
        (commit,) = [one for one in store.commits() if one.id == commit_id]
    assert commit is not None, f"{run_dir} has no commit"
    tensors = {part: hashes(store.load(commit, part)) for part in commit.parts}
    return {"step": commit.step, "tensors": tensors, "meta": store.meta(commit)}


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Type, shape and hash of the bytes of each tensor."""
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} "
        + hashlib.sha256(tensor.contiguous().reshape(-1).view(uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    """What the run has logged of its training, without times."""
    log = read_metrics(run_dir)
    assert log.events, f"{run_dir} has logged nothing"
    assert log.events[-1].get("status") == "done", f"the last event is {log.events[-1]}"
    return [event for event in log.events if event["event"] in EVENTS]


def without(value: Any, names: Collection[str]) -> Any:
    """A value of JSON without the fields of these names, wherever they stand."""
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    return [without(item, names) for item in value] if isinstance(value, list) else value


def last_step(run_dir: Path) -> int:
    """The last step that the log knows; 0 where there is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]  # a last line without end is torn
    except FileNotFoundError:
        return 0
    steps = (json.loads(line) for line in reversed(lines) if b'"event":"step"' in line)
    return int(next(steps, {"step": 0})["step"])


def cases(names: str | None = None) -> Iterator[Case]:
    """All cases, or those whose names are listed with commas; KeyError for an unknown one."""
    yield from CASES if names is None else (BY_NAME[name.strip()] for name in names.split(";"))
