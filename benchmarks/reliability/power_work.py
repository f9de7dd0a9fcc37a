"""The works whose power losses are tried: each does something below a folder, and knows what must be there after.

`do(root, draw, mark)` works below `root`, calls `mark(text)` for every promise made, and returns `check(folder, promised)`,
which raises when a folder, the state of a disk after a power loss, lacks something promised or holds something damaged.
With a third argument true the check also takes the work up again there.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reliability.children import prepare_to_fork
from reliability.runs import BY_NAME, P, config_of, differences, hashes, outcome_of, text
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.data.corpus import Corpus
from stackwise.data.prepare import prepare
from stackwise.data.settings import DataSettings
from stackwise.training.run import train

Check = Callable[..., None]
Mark = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """`share`: of all states. `most`: states of one recording. `goes_on`: share of its states in which the work is taken
    up again."""

    name: str
    says: str
    do: Callable[[Path, random.Random, Mark], Check]
    share: float
    most: int
    goes_on: float


def commits(root: Path, draw: random.Random, mark: Mark) -> Check:
    """Commits with parts that are new, changed, shared or large, pins, and prunes between them."""
    store = Store(root / "store")
    contents: dict[str, dict[str, dict[str, str]]] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    for step in range(1, draw.randint(4, 7)):
        for name in ("embedding/weights", "stack:s0/weights", "stack:s0/optimizer"):
            if name not in parts or draw.random() < 0.6:
                size = draw.choice((3, 200, 1500))
                parts[name] = {"a": torch.randn(size, generator=generator), "b": torch.zeros(2)}
        pin = f"stage-{step:02d}" if draw.random() < 0.3 else None
        commit = store.commit(parts, {"step": step}, step=step, pin=pin)
        contents[commit.id] = {part: hashes(tensors) for part, tensors in parts.items()}
        mark(f"commit {commit.id}")
        if draw.random() < 0.6:
            # from here on what goes is no longer promised, though it may still be there
            for identity in store.prune(Retention(2), dry_run=True).commits:
                mark(f"gone {identity}")
            store.prune(Retention(2))
        if draw.random() < 0.4:
            store.pin(f"mine-{step}", commit)
            mark(f"pin mine-{step} {commit.id}")

    def check(folder: Path, promised: Sequence[str], go_on: bool = False) -> None:
        store = Store(folder / "store")
        _check_commits(store, promised, contents)
        if go_on:
            written = store.commit(parts, {"step": 99}, step=99)
            store.prune(Retention(1))
            pinned = {name.split()[2] for name in promised if name.startswith("pin ")}
            assert pinned <= {one.id for one in store.commits()}, "a prune has removed what was pinned"
            assert [one.id for one in store.commits()][-1] == written.id
            _check_commits(Store(folder / "store"), [f"commit {written.id}"], {})

    return check


def _check_commits(store: Store, promised: Sequence[str], contents: dict[str, Any]) -> None:
    """All promised commits are there, and every one that is there is whole."""
    listed = {commit.id: commit for commit in store.commits()}
    latest = store.latest()  # raises for a damaged manifest or an object that is missing
    due = [name.removeprefix("commit ") for name in promised if name.startswith("commit ")]
    gone = {name.removeprefix("gone ") for name in promised if name.startswith("gone ")}
    for identity in due:
        assert identity in listed or identity in gone, (
            f"commit {identity} was reported durable and is not there"
        )
    assert not due or (latest is not None and latest.number >= listed[due[-1]].number)
    for name in promised:
        if name.startswith("pin "):
            _, pin, identity = name.split()
            assert store.pins().get(pin) == identity, f"the pin {pin} was made and is not there"
    for identity, commit in listed.items():
        found = {part: hashes(store.load(commit, part)) for part in commit.parts}
        if identity in contents:
            assert found == contents[identity], f"commit {identity} holds other tensors"


def training(root: Path, draw: random.Random, mark: Mark) -> Check:
    """A whole run from its first file to its last: commits, prunes, log, configuration, tokenizer."""
    prepare_to_fork()
    data = Path(tempfile.mkdtemp(prefix="stackwise-power-data-"))
    case = BY_NAME["append"]
    more = {
        "training.max_steps": 2,
        "training.seed": draw.randint(0, 99),
        P + "cache_dir": str(data / "cache"),
    }
    durable: dict[str, int] = {}

    class Listener:
        def emit(self, event: dict[str, Any]) -> None:
            if event["event"] == "checkpoint":
                durable[event["commit"]] = event["step"]
                mark(f"commit {event['commit']}")
            elif event["event"] == "run_end":
                mark("end")

        def close(self) -> None:
            pass

    train(config_of(case, root, data, **more), sinks=[Listener()], report=False)
    log = (root / "run" / "metrics.jsonl").read_bytes()
    wanted = outcome_of(root / "run", case)
    whole = {name: (root / "run" / name).read_bytes() for name in ("config.yaml", "tokenizer.json")}

    def check(folder: Path, promised: Sequence[str], go_on: bool = False) -> None:
        run_dir = folder / "run"
        store = Store(run_dir / "store")
        latest = store.latest()
        due = [name.removeprefix("commit ") for name in promised if name.startswith("commit ")]
        if due:
            assert latest is not None, "a commit was reported durable and none is there"
            assert latest.step >= durable[due[-1]], f"the newest commit is of step {latest.step}"
        if latest is not None:
            store.verify(latest)
            size = store.meta(latest)["metrics_bytes"]
            found = (run_dir / "metrics.jsonl").read_bytes()
            assert found[:size] == log[:size], f"the log of commit {latest.id} is not there whole"
            for name, data_ in whole.items():
                assert (run_dir / name).read_bytes() == data_, f"{name} is damaged"
        if go_on:
            train(config_of(case, folder, data, **more), sinks=[], report=False)
            unlike = list(differences(outcome_of(run_dir, case), wanted))
            assert not unlike, f"the run has come to another end: {unlike[:3]}"

    return check


def corpus(root: Path, draw: random.Random, mark: Mark) -> Check:
    """The tokens of a text: the folder is there whole or not at all."""
    source = Path(tempfile.mkdtemp(prefix="stackwise-power-text-")) / "text.txt"
    source.write_text(text(draw.randint(500, 6000)))
    settings = DataSettings(source="text", path=str(source), tokenizer="char")
    made = prepare(settings, root / "tokens")
    mark("corpus")

    def check(folder: Path, promised: Sequence[str], go_on: bool = False) -> None:
        place = folder / "tokens" / made.folder.name
        assert place.exists() or not promised, "the corpus was reported and is not there"
        if place.exists():
            found = Corpus.open(place)
            found.verify()
            assert found.hash == made.hash
        if go_on:
            found = prepare(settings, folder / "tokens")
            found.verify()
            assert found.hash == made.hash

    return check


def activations(root: Path, draw: random.Random, mark: Mark) -> Check:
    """Entries of the activation store: each is read as it was written, or is not there; flushed ones are there."""
    from stackwise.trunk.budget import Budget
    from stackwise.trunk.disk import DiskStore
    from stackwise.trunk.errors import CacheError
    from stackwise.trunk.layout import Header

    rows = draw.choice((1, 3, 40))
    header = Header.new({"trunk": "test"}, (rows, 16), 20, 1, "float32", "float32")
    bits = np.random.default_rng(draw.getrandbits(32))
    held = {n: bits.integers(0, 256, header.entry_bytes).astype(np.uint8) for n in range(20)}
    store = DiskStore(root / "cache", Budget(10**8))
    for number, raw in held.items():
        assert store.put(number, raw, header)
        if draw.random() < 0.2:
            store.flush()
            mark(str(number))
    store.close()
    mark(str(max(held)))

    def check(folder: Path, promised: Sequence[str], go_on: bool = False) -> None:
        if not go_on:  # opening repairs, so it needs a copy
            with tempfile.TemporaryDirectory(dir=folder.parent) as copy:
                shutil.copytree(folder, Path(copy) / "copy")
                check(Path(copy) / "copy", promised, True)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = DiskStore(folder / "cache", Budget(10**8))
            try:
                out = np.empty(header.entry_bytes, np.uint8)
                for number, raw in held.items():
                    there = number in found and found.get(number, out)
                    assert not there or (out == raw).all(), f"entry {number} was read with other bytes"
                    assert there or not promised or number > int(promised[-1]), f"entry {number} was flushed"
            except CacheError:
                assert not promised
            finally:
                found.close()

    return check


WORKS = (
    Work(
        "commits and prunes", "the store alone, with random parts, sizes and pins", commits, 0.6, 3000, 0.02
    ),
    Work("training run", "every file that a run writes", training, 0.3, 5000, 0.005),
    Work("corpus", "tokens prepared from text", corpus, 0.05, 200, 0.05),
    Work("activation store", "stored outputs of a frozen trunk", activations, 0.05, 500, 0.0),
)
