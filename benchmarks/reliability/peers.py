"""The same faults on other ways of saving: torch.save, torch.distributed.checkpoint and safetensors, as people use them.

Each saves the same tensors again and again under the same name. It is killed at random times, its files get a flipped bit,
and it runs into a full disk. What loads afterwards must be, bit for bit, something that was saved.
"""

from __future__ import annotations

import contextlib
import logging
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reliability.children import RAM_DISK, Spent, end_of, fork, prepare_to_fork
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store

Tensors = dict[str, Tensor]
NUMBERS = 100_000
"""Numbers in each of six tensors: 2.4 MB to save, which takes long enough for a kill to fall into."""
ROUND = 0.03
"""Seconds within which a kill falls, from the first overwrite on; about three of them."""


@dataclass(frozen=True)
class Peer:
    """A way to save under `folder`, and to load again. `package`: whose version is told."""

    name: str
    package: str
    save: Callable[[Path, int, Tensors], object]
    load: Callable[[Path], Tensors]


def state_of(step: int) -> Tensors:
    """Tensors whose every number tells the step."""
    whole = torch.arange(NUMBERS, dtype=torch.float32)
    return {f"layer.{n}.weight": whole + 1000.0 * step + n for n in range(6)}


def _save_torch(folder: Path, step: int, tensors: Tensors) -> None:
    torch.save(tensors, folder / "model.pt")


def _load_torch(folder: Path) -> Tensors:
    return dict(torch.load(folder / "model.pt", weights_only=True))


def _save_dcp(folder: Path, step: int, tensors: Tensors) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)


def _load_dcp(folder: Path) -> Tensors:
    import torch.distributed.checkpoint as dcp

    tensors = {name: torch.zeros_like(tensor) for name, tensor in state_of(0).items()}
    dcp.load(tensors, checkpoint_id=folder / "dcp", no_dist=True)
    return tensors


def _save_safetensors(folder: Path, step: int, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")


def _load_safetensors(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _save_stackwise(folder: Path, step: int, tensors: Tensors) -> None:
    store = Store(folder / "store")
    store.commit({"model/weights": tensors}, {"step": step}, step=step)
    store.prune(Retention(1))


def _load_stackwise(folder: Path) -> Tensors:
    store = Store(folder / "store")
    commit = store.latest()
    if commit is None:
        raise FileNotFoundError("no commit")
    return store.load(commit, "model/weights")


PEERS = (
    Peer("StackWise", "stackwise", _save_stackwise, _load_stackwise),
    Peer("torch.save", "torch", _save_torch, _load_torch),
    Peer("torch.distributed.checkpoint", "torch", _save_dcp, _load_dcp),
    Peer("safetensors", "safetensors", _save_safetensors, _load_safetensors),
)


def run(
    count: int, seed: int, *, seconds: float = float("inf"), peers: Sequence[Peer] = PEERS
) -> dict[str, Any]:
    """`count` kills, half as many full disks and five times as many flips for each; the record.

    What other programs lose is counted; only what StackWise loses is a failure.
    """
    prepare_to_fork()
    spent = Spent()
    rows = []
    place = Path(tempfile.mkdtemp(prefix="stackwise-peers-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for peer in peers:
                draw = random.Random(f"{seed}/{peer.name}")
                made = {
                    "kills": _kills(peer, place, draw, count),
                    "flips": _flips(peer, place, draw, 5 * count),
                    "full": _full(peer, place, draw, max(1, count // 2)),
                }
                rows.append({"peer": peer.name, "version": version(peer.package), **made})
                if spent.since()["seconds"] > seconds:
                    break
    finally:
        shutil.rmtree(place, ignore_errors=True)
    ours = [row for row in rows if row["peer"] == "StackWise"]
    again = f"python benchmarks/faults.py --only peers --seed {seed} --peers {count}"
    failures = [
        f"StackWise, {kind}: {row[kind]}; again: {again}"
        for row in ours
        for kind in ("kills", "flips", "full")
        if row[kind].get("nothing loads", 0) or row[kind].get("other tensors", 0)
    ]
    return {"seed": seed, "asked": count, "peers": rows, "failures": failures, **spent.since()}


def _outcome(peer: Peer, folder: Path, allowed: Callable[[int], bool]) -> str:
    """What loads: `as saved`, `other tensors` than any that were saved, or `nothing loads`."""
    try:
        found = peer.load(folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "nothing loads"
    first = found.get("layer.0.weight")
    if first is None or first.numel() != NUMBERS:
        return "other tensors"
    step = round(float(first[0]) / 1000.0) if bool(first[0].isfinite()) and abs(first[0]) < 1e8 else -1
    if not allowed(step):
        return "other tensors"
    wanted = state_of(step)
    alike = found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    return "as saved" if alike else "other tensors"


def _kills(peer: Peer, place: Path, draw: random.Random, count: int) -> dict[str, int]:
    """Killed while it overwrites what it saved before."""
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        with _folder(place) as folder:
            peer.save(folder, 1, state_of(1))
            ready = folder / "ready"

            def overwrite(folder: Path = folder, ready: Path = ready) -> None:
                states = [state_of(step) for step in (2, 3)]
                ready.touch()
                for step in range(2, 1000):
                    peer.save(folder, step, states[step % 2])

            pid = fork(overwrite, folder / "error.txt")
            while not ready.exists() and not (folder / "error.txt").exists():
                pass
            assert end_of(pid, ROUND * draw.random()) == -signal.SIGKILL, (folder / "error.txt").read_text()
            outcomes[_outcome(peer, folder, lambda step: step in (1, 2, 3))] += 1
    return dict(outcomes)


def _flips(peer: Peer, place: Path, draw: random.Random, count: int) -> dict[str, int]:
    """One bit of one file flipped: found, harmless (the same tensors), or silently other tensors."""
    outcomes: Counter[str] = Counter()
    with _folder(place) as folder:
        peer.save(folder, 1, state_of(1))
        files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
        sizes = [path.stat().st_size for path in files]
        for _ in range(count):
            (path,) = draw.choices(files, sizes)
            content = path.read_bytes()
            at = draw.randrange(len(content))
            path.chmod(0o644)
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
            outcome = _outcome(peer, folder, lambda step: step == 1)
            path.write_bytes(content)
            outcomes["found" if outcome == "nothing loads" else outcome] += 1
    return dict(outcomes)


def _full(peer: Peer, place: Path, draw: random.Random, count: int) -> dict[str, int]:
    """Overwriting fails because no file may grow beyond a part of what is needed (as on a full disk); what loads?"""
    outcomes: Counter[str] = Counter()
    whole = 6 * 4 * NUMBERS
    for _ in range(count):
        with _folder(place) as folder:
            peer.save(folder, 1, state_of(1))
            size = draw.randrange(1000, whole)

            def overwrite(folder: Path = folder, size: int = size) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                with contextlib.suppress(BaseException):
                    peer.save(folder, 2, state_of(2))

            end_of(fork(overwrite, folder / "error.txt"))
            outcomes[_outcome(peer, folder, lambda step: step == 1)] += 1
    return dict(outcomes)


@contextlib.contextmanager
def _folder(place: Path) -> Any:
    folder = Path(tempfile.mkdtemp(dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
