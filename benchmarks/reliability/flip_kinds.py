"""Every kind of file that StackWise writes, with how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reliability.runs import BY_NAME, config_of, hashes
from stackwise.adapters.io import load_set, save_set
from stackwise.checkpoint.store import Store
from stackwise.config.root import StackWiseConfig
from stackwise.data.prepare import prepare
from stackwise.interop.hf_export import write_model
from stackwise.interop.hf_import import read_model
from stackwise.model.files import load_weights, save_weights
from stackwise.model.rack import Rack
from stackwise.tracking.metrics import MetricsFile
from stackwise.training.changes import changes_between, course_of
from stackwise.training.run import train
from stackwise.training.stored import open_run
from stackwise.trunk.budget import Budget
from stackwise.trunk.disk import DiskStore
from stackwise.trunk.layout import Header


@dataclass
class Kind:
    """Files of one kind. `read` gives something comparable by JSON, or raises; `wanted` is what it gives undamaged.

    `share`: of all flips. `warns`: a warning of StackWise counts as found, for what is then computed again. `restore` puts
    back what a reading has changed besides the damaged file.
    """

    name: str
    says: str
    files: Sequence[Path]
    read: Callable[[], Any]
    share: float = 1.0
    warns: bool = False
    restore: Callable[[], None] = lambda: None
    wanted: Any = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = self.read()


def kinds(place: Path) -> Iterator[Kind]:
    """Make one of everything below `place`."""
    data = place / "data"
    data.mkdir()
    yield from _store(place, data, "append")
    yield from _store(place, data, "adapters over nf4")
    yield from _run_files(place, data)
    yield from _corpus(data)
    yield from _activations(place)
    yield from _exports(place)


def _store(place: Path, data: Path, case: str) -> Iterator[Kind]:
    """The objects of the newest commit by kind of part, its manifest, and the names that can be made again."""
    config = config_of(BY_NAME[case], place, data, case.replace(" ", "-"))
    root = Path(train(config, sinks=[], report=False)["run_dir"]) / "store"
    newest = Store(root).latest()
    assert newest is not None

    def read() -> Any:
        store = Store(root)
        commit = store.latest()
        assert commit is not None
        return [
            commit.id,
            {part: hashes(store.load(commit, part)) for part in commit.parts},
            store.meta(commit),
        ]

    groups: dict[str, list[Path]] = {}
    for name, part in newest.parts.items():
        groups.setdefault(_sort(name), []).append(root / "objects" / part.sha256[:2] / part.sha256)
    for sort, files in sorted(groups.items()):
        yield Kind(f"{case}: {sort}", f"objects of the store: {sort}", sorted(set(files)), read)
    yield Kind(f"{case}: manifest", "what a commit consists of", [newest.path], read)
    refs = [path for path in (root / "refs").rglob("*") if path.is_file()]
    yield Kind(f"{case}: names", "refs, which are made again from the manifests", refs, read, 0.3)


def _sort(part: str) -> str:
    """embedding/weights, stack weights, adapters, optimizer and so on, whatever stack it is of."""
    owner, _, kind = part.partition("/")
    if kind.startswith("lora."):
        return "adapters" if kind.endswith("weights") else "moments of adapters"
    return f"{owner.partition(':')[0]} {kind}"


def _run_files(place: Path, data: Path) -> Iterator[Kind]:
    """The files beside the store, as the next start of the run and as `generate` read them."""
    config = config_of(BY_NAME["end to end"], place, data, "files")
    run_dir = Path(train(config, sinks=[], report=False)["run_dir"])

    def opened() -> Any:
        run = open_run(run_dir)
        return [run.commit.id, list(run.tokenizer.encode("the frozen trunk"))]

    def settings() -> Any:
        found = course_of(StackWiseConfig.from_yaml(run_dir / "config.yaml"))
        if changes := changes_between(kept()["config"], found):
            raise Told(f"{run_dir} holds a run with other settings: {changes}")
        return found

    def kept() -> dict[str, Any]:
        store = Store(run_dir / "store")
        commit = store.latest()
        assert commit is not None
        return store.meta(commit)

    yield Kind("tokenizer.json", "of a run", [run_dir / "tokenizer.json"], opened, 0.5)
    yield Kind(
        "config.yaml",
        "settings that decide the course of the run; the rest is the user's to edit at any time",
        [run_dir / "config.yaml"],
        settings,
    )
    log = run_dir / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[: kept()["metrics_bytes"]])
    whole = log.read_bytes()

    def resumed() -> Any:
        found = MetricsFile(run_dir, kept())
        found.close()
        if found.problem is not None:
            raise Told(found.problem)
        return log.read_text()

    def put_back() -> None:
        log.write_bytes(whole)
        for path in run_dir.glob("metrics.damaged-*"):
            path.unlink()

    yield Kind("metrics.jsonl", "up to the newest commit", [log], resumed, restore=put_back)


class Told(Exception):
    """A damage that is reported in the log and on the console, and stops nothing."""

    __module__ = "stackwise.benchmark"


def _corpus(data: Path) -> Iterator[Kind]:
    """Prepared tokens, as the next run reads them."""
    config = config_of(BY_NAME["append"], data, data)
    assert config.data.cache_dir is not None

    def read() -> Any:
        corpus = prepare(config.data, config.data.cache_dir)
        return [
            corpus.hash,
            [
                [split.tokens.tolist(), split.doc_starts.tolist()]
                for split in (corpus.train, corpus.validation)
            ],
            list(corpus.tokenizer.encode("the frozen trunk")),
        ]

    folder = prepare(config.data, config.data.cache_dir).folder
    yield Kind("corpus: tokens", "prepared text", sorted(folder.glob("*.bin")), read)
    yield Kind("corpus: manifest", "of prepared text", [folder / "manifest.json"], read)
    yield Kind("corpus: tokenizer", "of prepared text", [folder / "tokenizer.json"], read)


def _activations(place: Path) -> Iterator[Kind]:
    """Stored outputs of a trunk: whatever is damaged is computed again."""
    header = Header.new({"trunk": "test"}, (3, 16), 20, 1, "float32", "float32")
    bits = np.random.default_rng(0)
    held = {n: bits.integers(0, 256, header.entry_bytes).astype(np.uint8) for n in range(20)}
    folder = place / "activations"
    store = DiskStore(folder, Budget(10**8))
    for number, raw in held.items():
        store.put(number, raw, header)
    store.close()
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def read() -> Any:
        found = DiskStore(folder, Budget(10**8))
        try:
            if found.header is not None:
                found.header.check(header, folder)
            out = np.empty(header.entry_bytes, np.uint8)
            there = [
                number in found and found.get(number, out) and bool((out == raw).all())
                for number, raw in held.items()
            ]
            wrong = [
                n for n, raw in held.items() if n in found and found.get(n, out) and not (out == raw).all()
            ]
            if not wrong and not all(there):
                raise Told("entries are computed again")
            return [there, wrong]
        finally:
            found.close()

    def put_back() -> None:
        for path in folder.iterdir():
            if path not in whole and path.is_file():
                path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)

    for name in ("store.json", "index.bin", "shard-*.bin"):
        yield Kind(
            f"activations: {name}",
            "stored outputs of a trunk",
            sorted(folder.glob(name)),
            read,
            restore=put_back,
        )


def _exports(place: Path) -> Iterator[Kind]:
    """What is handed to others: model folders, adapter sets, single stacks."""
    run = open_run(place / "append")
    out = write_model(run.rack, run.tokenizer, place / "export", config=run.config).path

    def model() -> Any:
        found = read_model(out)
        return [hashes(found.rack.state_dict()), found.config.to_dict(), found.generation]

    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "SHA256SUMS",
    ):
        if (out / name).exists():
            yield Kind(f"export: {name}", "of an exported model", [out / name], model)

    tensors = {"a": torch.arange(300.0)}
    single = save_weights(place / "single.safetensors", tensors, kind="stack", spec={"d_ff": 12, "eps": 1e-5})

    def alone() -> Any:
        tensors, facts = load_weights(single, kind="stack")
        return [hashes(tensors), facts]

    yield Kind("single stack", "a stack saved by itself", [single], alone)

    adapted = open_run(place / "adapters-over-nf4").rack
    folder = save_set(adapted, "stack", place / "adapters")
    bare: Rack = open_run(place / "append").rack

    def adapters() -> Any:
        load_set(bare, folder, "stack")
        try:
            return hashes({n: t for n, t in bare.state_dict().items() if "lora" in n})
        finally:
            from stackwise.adapters.attach import remove

            for stack in bare.stacks:
                if any(spec.name == "stack" for spec in stack.adapters):
                    remove(stack, "stack")

    yield Kind(
        "adapter set",
        "weights and configuration",
        sorted(p for p in folder.iterdir() if p.is_file()),
        adapters,
    )
