"""Resumes that forget one thing: the comparison that the kills rely on must notice every one.

A run is stopped at a step, as by a kill, and taken up again, once as it is and once with a mutant: one piece of state is
lost on the way. The first must come to the end of an undisturbed run, the second to another end, or to an error. Where
StackWise has no such state, the mutant loses the nearest thing it has; `instead` says what and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from reliability.children import RAM_DISK, Spent, prepare_to_fork
from reliability.runs import BY_NAME, Case, P, config_of, differences, outcome_of
from stackwise.checkpoint.store import Store
from stackwise.data.loader import TokenLoader
from stackwise.objectives import masking
from stackwise.training import resume, state, stepping
from stackwise.training.guard import GuardState
from stackwise.training.loop import Engine
from stackwise.training.run import train

Patches = Callable[[], AbstractContextManager[object]]


class Stopped(BaseException):
    """What stands for the kill: nothing in a run catches it."""


@dataclass(frozen=True)
class Mutant:
    """`lost`: the piece of state, in the words of other programs. `resume`: patches of the process that takes the run up;
    `world`: of every process, the undisturbed one too. `around`: patches without which the state would not be there at
    all. `stops`: steps after which the run is stopped, in turn."""

    lost: str
    case: str
    resume: Patches = contextlib.nullcontext
    world: Patches = contextlib.nullcontext
    around: Patches = contextlib.nullcontext
    keys: dict[str, Any] = field(default_factory=dict)
    stops: tuple[int, ...] = (6, 3)
    instead: str = ""


def run(stops: int, seed: int, *, seconds: float = float("inf"), only: str | None = None) -> dict[str, Any]:
    """Try every mutant at up to `stops` places; the record. `only`: one, by what it loses."""
    prepare_to_fork()
    spent = Spent()
    rows, failures = [], []
    place = Path(tempfile.mkdtemp(prefix="stackwise-mutants-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
    try:
        trials = Trials(place)
        for mutant in MUTANTS:
            if only not in (None, mutant.lost) or spent.since()["seconds"] > seconds:
                continue
            row = {"lost": mutant.lost, "instead": mutant.instead, "stops": 0, "noticed": 0, "by": ""}
            again = f"python benchmarks/faults.py --only mutants --work {mutant.lost!r}"
            for stop in mutant.stops[:stops]:
                row["stops"] += 1
                plain, mutated = trials.both(mutant, stop)
                if plain:
                    failures.append(
                        f"{mutant.lost}, stopped at {stop}: not exact without a mutant: {plain}; again: {again}"
                    )
                row["noticed"] += bool(mutated)
                row["by"] = row["by"] or mutated.replace(f"{place}/", "")
            if not row["noticed"]:
                failures.append(f"{mutant.lost}: a resume that loses it goes unnoticed; again: {again}")
            rows.append(row)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "seed": seed,
        "mutants": len(rows),
        "noticed": sum(bool(row["noticed"]) for row in rows),
        "rows": rows,
        "failures": failures,
        **spent.since(),
    }


class Trials:
    """Runs of mutants below `folder`; what does not depend on a mutant is trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Any] = {}

    def both(self, mutant: Mutant, stop: int) -> tuple[str, str]:
        """What a run that was stopped differs in from an undisturbed one: taken up as it is, and by the mutant."""
        case = BY_NAME[mutant.case]
        small = {} if mutant.case == "end to end" else SMALL
        case = dataclasses.replace(case, keys={**case.keys, **small, **mutant.keys})
        key = json.dumps([case.name, dict(case.keys)])
        with mutant.around():
            plain = self._once(f"{key}/{stop}", lambda: self._trial(case, stop, key))
            same = mutant.world is contextlib.nullcontext
            mutated = self._trial(case, stop, key if same else f"{key}/{mutant.lost}", mutant)
        return plain, mutated

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _trial(self, case: Case, stop: int, key: str, mutant: Mutant | None = None) -> str:
        """The first difference to the undisturbed run; empty: none."""
        wanted = self._once(key, lambda: self._train(case, "undisturbed", mutant))
        with _stopping(stop), contextlib.suppress(Stopped):
            self._train(case, "stopped", mutant)
        try:
            with (contextlib.nullcontext if mutant is None else mutant.resume)():
                return next(differences(self._train(case, "stopped", mutant, rest=True), wanted), "")
        except Exception as error:  # noqa: BLE001 a resume that fails is noticed
            return f"{type(error).__name__}: {error}"

    def _train(self, case: Case, run_id: str, mutant: Mutant | None, rest: bool = False) -> dict[str, Any]:
        """Train, or go on training: in a process of its own, as far as the patches of a mutant are concerned."""
        run_dir = self.folder / run_id
        if not rest:
            shutil.rmtree(run_dir, ignore_errors=True)
        config = config_of(case, self.folder, self.folder, run_id, **{"checkpoint.asynchronous": False})
        with (contextlib.nullcontext if mutant is None else mutant.world)():
            train(config, sinks=[], report=False)
        # which commits are kept says what is known of their losses
        kept = [commit.step for commit in Store(run_dir / "store").commits()]
        return {"kept": kept, **outcome_of(run_dir, case)}


@contextlib.contextmanager
def _stopping(step: int) -> Iterator[None]:
    original = Engine._after_step

    def after(self: Engine, stage: Any) -> None:
        original(self, stage)
        if self.progress.step == step:
            raise Stopped

    with patch.object(Engine, "_after_step", after):
        yield


def _all(*patches: Any) -> Patches:
    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for one in patches:
                stack.enter_context(one())
            yield

    return entered


def _replaced(owner: Any, name: str, made: Callable[[Any], Any]) -> Patches:
    """`owner.name` replaced by `made(original)`, made anew for every process."""
    return lambda: patch.object(owner, name, made(getattr(owner, name)))


def _progress(**lost: Any) -> Patches:
    """Counters put back, but for these; a value that can be called is made anew."""

    def made(original: Any) -> Any:
        def progress_of(meta: dict[str, Any]) -> Any:
            progress = original(meta)
            for name, value in lost.items():
                setattr(progress, name, value() if callable(value) else value)
            return progress

        return progress_of

    return _replaced(state, "progress_of", made)


def _without_step_counts(original: Any) -> Any:
    def load(store: Store, commit: Any) -> Any:
        found = original(store, commit)
        for moments in found.values():
            if "step" in moments:
                moments["step"] = torch.zeros_like(moments["step"])
        return found

    return load


def _own_generator(original: Any) -> Any:
    """Draws that come from a generator of the process, whose state nobody saves."""
    draw = torch.Generator().manual_seed(7)

    def keys(seed: int, stream: str, *parts: torch.Tensor) -> torch.Tensor:
        return torch.randint(-(2**62), 2**62, parts[0].shape, generator=draw)

    return keys


@contextlib.contextmanager
def _one_seed_for_all() -> Iterator[None]:
    """Dropout from torch's own generator, seeded once per process."""
    torch.manual_seed(3)
    with patch.object(torch, "manual_seed", lambda seed: None):
        yield


def _rate_of_the_process(original: Any) -> Any:
    done = iter(range(10**9))
    return lambda stage, step, training: original(stage, min(next(done), stage.steps - 1), training)


def _without_reshape(original: Any) -> Any:
    def restore_position(loader: TokenLoader, stages: Any, progress: Any, meta: dict[str, Any]) -> None:
        loader.load_state_dict(meta["loader"])

    return restore_position


def _without_parked(original: Any) -> Any:
    def restore(self: Engine, *rest: Any) -> None:
        original(self, *rest)
        self.parked = {}

    return restore


SMALL = {"model.architecture.n_stacks": 2, "training.max_steps": 4}
CACHED = {P + "cache_activations": True, P + "cache_dtype": "bfloat16", "model.dropout": 0.0}
HALF = {P + "new_stack_precision": "half", "checkpoint.full_precision_backup": False}
ROWS = {
    "training.stages": [
        {"train": ["all"], "n_stacks": 3, "max_steps": 3},
        {"train": ["all"], "max_steps": 6, "seq_len": 8, "batch_size": 3},
    ]
}

MUTANTS = (
    Mutant(
        "optimizer state",
        "append",
        _replaced(state, "load_optimizer_state", lambda _: lambda store, commit: {}),
    ),
    Mutant(
        "step counter of the optimizer",
        "append",
        _replaced(state, "load_optimizer_state", _without_step_counts),
    ),
    Mutant(
        "random state of torch",
        "append",
        world=_one_seed_for_all,
        instead="nothing is restored: dropout is seeded by step, and here it is not",
    ),
    Mutant(
        "random state of numpy or Python",
        "masked diffusion",
        world=_replaced(masking, "keys", _own_generator),
        instead="nothing is restored: masks are keyed by sample, and here they are not",
    ),
    Mutant(
        "position in the data",
        "append",
        _replaced(TokenLoader, "load_state_dict", lambda _: lambda self, state: None),
    ),
    Mutant(
        "remainder of packing",
        "end to end",
        _replaced(resume, "restore_position", _without_reshape),
        keys=ROWS,
        stops=(4, 6),
        instead="rows are cut at fixed places; the length and number of rows of the stage are lost",
    ),
    Mutant("step within the stage", "append", _progress(stage_step=0)),
    Mutant(
        "learning rate",
        "append",
        world=_replaced(stepping, "stage_factor", _rate_of_the_process),
        instead="nothing is restored: it follows from the step, and here from the steps of the process",
    ),
    Mutant(
        "scale of the loss",
        "append",
        _replaced(resume, "restore_scale", lambda _: lambda engine, meta: None),
        around=_all(
            lambda: patch("stackwise.training.device.check_compute", lambda *_: None),
            lambda: patch.object(torch.amp, "GradScaler", partial(torch.amp.GradScaler, growth_interval=2)),
        ),
        keys=HALF,
    ),
    Mutant(
        "average of weights",
        "cyclic",
        _replaced(Engine, "restore", _without_parked),
        stops=(4, 7),
        instead="there is none; the moments of stacks that rest are lost",
    ),
    Mutant("window of spikes", "end to end", _progress(guard=GuardState), stops=(4, 6)),
    Mutant(
        "early stop",
        "append",
        _progress(stores=False),
        keys=CACHED,
        stops=(6, 7),
        instead="there is none; the decision to keep the outputs of the trunk is lost",
    ),
    Mutant(
        "best metric",
        "end to end",
        _replaced(Store, "score", lambda _: lambda self, step, loss: None),
        keys={"evaluation.interval": 2, "checkpoint.keep_best": 1, "checkpoint.keep_last": 1},
        stops=(2, 4),
    ),
    Mutant(
        "full-precision weights",
        "adapters over nf4",
        _replaced(state, "full_precision_parts", lambda _: lambda spec, parent: {}),
        stops=(6, 7),
    ),
    Mutant(
        "bias of routers",
        "end to end",
        _replaced(state, "load_rack", lambda original: lambda *rest: _level(original(*rest))),
        keys={
            "model.moe.n_experts": 3,
            "model.moe.d_ff": 16,
            "model.moe.balancing": "bias",
            "model.moe.router": "sigmoid",
        },
        stops=(4, 6),
    ),
    Mutant(
        "sum of losses since the last line",
        "end to end",
        _progress(loss_sum=0.0, loss_count=0),
        keys={"tracking.log_interval": 5},
        stops=(4, 6),
    ),
    Mutant(
        "length of the log",
        "end to end",
        _all(
            _replaced(resume, "restore_metrics", lambda _: lambda metrics, meta: None),
            _replaced(
                Store,
                "meta",
                lambda original: (
                    lambda self, commit: {
                        k: v for k, v in original(self, commit).items() if k != "metrics_bytes"
                    }
                ),
            ),
        ),
        stops=(5, 7),
    ),
)


def _level(rack: Any) -> Any:
    for name, tensor in rack.state_dict().items():
        if name.endswith("bias") and "router" in name:
            tensor.zero_()
    return rack
