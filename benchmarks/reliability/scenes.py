"""Everything that writes, as works that can be killed or made to fail, and be taken up again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reliability.runs import BY_NAME, config_of, differences, hashes, outcome_of
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.checkpoint.upkeep import repair
from stackwise.data.prepare import prepare
from stackwise.interop.hf_export import write_model
from stackwise.interop.hf_import import read_model
from stackwise.training.run import train
from stackwise.training.stored import open_run

Parts = dict[str, dict[str, torch.Tensor]]


@dataclass
class Scene:
    """A work that is killed. `begin(folder)` sets it up; `do(folder)` is killed; `check(folder)` looks at what is left, takes
    the work up again, and raises where something is not as it must be."""

    name: str
    says: str
    begin: Callable[[Path], None]
    do: Callable[[Path], object]
    check: Callable[[Path], None]


def _parts(step: int) -> Parts:
    """The embedding never changes, the stack and its moments do."""
    made = torch.Generator().manual_seed(step)
    return {
        "embedding/weights": {"weight": torch.arange(24.0)},
        "stack:s0/weights": {"a": torch.randn(300, generator=made), "b": torch.zeros(3)},
        "stack:s0/optimizer": {"a::exp_avg": torch.randn(300, generator=made)},
    }


def _save(folder: Path, step: int) -> None:
    Store(folder / "store").commit(_parts(step), {"step": step}, step=step)


def _whole(folder: Path, *steps: int) -> None:
    """The newest commit is of one of these steps (0: there is none), and all commits hold what was saved."""
    store = Store(folder / "store")
    latest = store.latest()
    assert (latest.step if latest else 0) in steps, f"the newest commit is {latest}, not of step {steps}"
    for commit in store.commits():
        found = {part: hashes(store.load(commit, part)) for part in commit.parts}
        assert found == {part: hashes(tensors) for part, tensors in _parts(commit.step).items()}
        assert store.meta(commit) == {"step": commit.step}


def _go_on(folder: Path) -> None:
    """The next writer finds the lock free, sweeps what the dead one left, and leaves nothing but what it keeps."""
    _save(folder, 9)
    _whole(folder, 9)
    Store(folder / "store").prune(Retention(1, stages=False))
    left = list((folder / "store" / "objects").glob("*/*"))
    assert len(left) >= 3
    assert list((folder / "store" / "tmp").iterdir()) == []


def _check_store(*steps: int) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        _whole(folder, *steps)
        _go_on(folder)

    return check


def _several(folder: Path) -> None:
    for step in range(1, 5):
        _save(folder, step)


def scenes(place: Path) -> Iterator[Scene]:
    """Every kind of work that writes; what they share is made below `place`."""
    nothing: Callable[[Path], None] = lambda folder: None  # noqa: E731
    yield Scene(
        "first save", "a commit into an empty store", nothing, lambda f: _save(f, 1), _check_store(0, 1)
    )
    yield Scene(
        "reused object",
        "a commit that shares a part with the one before",
        lambda f: _save(f, 1),
        lambda f: _save(f, 2),
        _check_store(1, 2),
    )
    yield Scene(
        "gc",
        "a prune of three of four commits",
        _several,
        lambda f: Store(f / "store").prune(Retention(1)),
        _check_store(4),
    )
    yield _references()
    yield _repair()
    data = place / "data"
    data.mkdir()
    for name, on in (("stage change", False), ("async", True)):
        says = f"a whole run with growth, saved {'from a thread' if on else 'between its steps'}"
        yield training(name, says, data, {"checkpoint.asynchronous": on})
    yield _corpus(data)
    yield _export(place, data)


def _references() -> Scene:
    """Pins and scores."""

    def do(folder: Path) -> None:
        store = Store(folder / "store")
        store.pin("mine", store.commits()[1])
        store.score(3, 1.5)
        store.unpin("mine")
        store.pin("other", store.commits()[0])

    def check(folder: Path) -> None:
        store = Store(folder / "store")
        ids = [commit.id for commit in store.commits()]
        assert set(store.pins().values()) <= set(ids)
        assert set(store.scores().values()) <= {1.5}
        _whole(folder, 4)
        do(folder) if not store.pins() else None
        _go_on(folder)

    return Scene("pins and scores", "small files of the store", _several, do, check)


def _repair() -> Scene:
    """A damaged manifest is set aside."""

    def begin(folder: Path) -> None:
        _several(folder)
        newest = Store(folder / "store").latest()
        assert newest is not None
        newest.path.chmod(0o644)
        newest.path.write_bytes(b"\0" * 100)

    def do(folder: Path) -> None:
        repair(Store(folder / "store"))

    def check(folder: Path) -> None:
        do(folder)  # a second repair ends what the first began
        _whole(folder, 3)
        _go_on(folder)

    return Scene("repair", "a damaged manifest is moved away", begin, do, check)


def training(name: str, says: str, data: Path, changes: dict[str, Any], case: str = "append") -> Scene:
    """A whole run of a case, with its tokens below `data`."""
    more = {"training.max_steps": 2, "model.architecture.n_stacks": 2, **changes}

    def do(folder: Path) -> None:
        train(config_of(BY_NAME[case], folder, data, **more), sinks=[], report=False)

    with tempfile.TemporaryDirectory(dir=data) as undisturbed:
        do(Path(undisturbed))
        wanted = outcome_of(Path(undisturbed) / "run", BY_NAME[case])

    def check(folder: Path) -> None:
        store = Store(folder / "run" / "store")
        latest = store.latest()
        if latest is not None:
            store.verify(latest)
        do(folder)
        unlike = list(differences(outcome_of(folder / "run", BY_NAME[case]), wanted))
        assert not unlike, f"the run has come to another end: {unlike[:3]}"

    return Scene(name, says, lambda folder: None, do, check)


def _corpus(data: Path) -> Scene:
    settings = config_of(BY_NAME["append"], data, data).data

    def do(folder: Path) -> None:
        prepare(settings, folder / "tokens").verify()

    return Scene("corpus", "tokens prepared from text", lambda folder: None, do, do)


def _export(place: Path, data: Path) -> Scene:
    run_dir = Path(
        train(config_of(BY_NAME["append"], place, data, "to-export"), sinks=[], report=False)["run_dir"]
    )
    run = open_run(run_dir)

    def do(folder: Path) -> None:
        write_model(run.rack, run.tokenizer, folder / "out", config=run.config)

    do(place)
    wanted = hashes(read_model(place / "out").rack.state_dict())

    def check(folder: Path) -> None:
        if not (folder / "out").exists():
            do(folder)
        assert hashes(read_model(folder / "out").rack.state_dict()) == wanted

    return Scene("export", "a model folder for others", lambda folder: None, do, check)
