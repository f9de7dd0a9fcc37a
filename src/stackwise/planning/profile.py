"""A few real steps of one stage of a run: how fast, where the time goes, which bytes are alive, and what was planned."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.resolve import resolve
from stackwise.curriculum.curricula import stages as stages_of_config
from stackwise.curriculum.specs import first_spec
from stackwise.data.prepare import prepare
from stackwise.model.lexical import take_table_of
from stackwise.model.rack import Rack
from stackwise.objectives.build import objective_of
from stackwise.planning.devices import device_named, limited
from stackwise.planning.facts import own_device
from stackwise.planning.plan import plan_on
from stackwise.planning.step_bytes import ByteLine, StepRecorder
from stackwise.tracking.environment import peak_rss_bytes
from stackwise.training.device import deterministic, keep_freed_memory, pick_device, pick_dtype
from stackwise.training.loaders import identity_of, loader_steps, make_loader
from stackwise.training.loop import Engine
from stackwise.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.curriculum.stage import Stage
    from stackwise.planning.report import Plan, StagePlan

__all__ = ["PARTS", "Operator", "Profile", "profile"]

PARTS = ("data", "forward", "backward", "optimizer", "other")
_PART_OF = {
    "the corruption": "data",
    "the forward pass": "forward",
    "the backward pass": "backward",
    "the optimizer's step": "optimizer",
}
"""What an engine says it is doing -> the part of a step. The norm of the gradients is part of the backward pass."""
TRACED = 2
"""Steps that the profiler of PyTorch sees; it slows them, so none of them is timed."""


@dataclass(frozen=True)
class Operator:
    """One kind of operation in the traced steps: `calls` and `seconds` of its own, per step."""

    name: str
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What was measured of a stage. Seconds are per optimizer step.

    `planned` and `measured`: bytes by item, as a run counts them; `alive` is the most alive at once, with what passes
    on top of the items. `line` null: blocks are compiled, and their insides cannot be followed. `allocated`: the peak of
    CUDA's allocator in a timed step. `trace`: a gzipped file for chrome://tracing or Perfetto.
    """

    run_id: str
    stage: int
    stages: int
    name: str
    device: str
    dtype: str
    steps: int
    tokens: int
    seconds: float
    flops: float
    peak_rate: float
    parts: dict[str, float]
    operators: list[Operator]
    planned: dict[str, int]
    measured: dict[str, int | None]
    line: ByteLine | None
    rss_bytes: int | None
    allocated: int | None
    trace: bytes

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: everything but the trace and the line, of which there is the peak."""
        told = {
            name: value for name, value in vars(self).items() if name not in ("trace", "line", "operators")
        }
        alive = None if self.line is None else self.line.peak[1]
        rates = {"tokens_per_s": self.tokens_per_s, "flops_per_s": self.flops_per_s}
        return {**told, **rates, "operators": [asdict(row) for row in self.operators], "at_peak": alive}


def profile(
    config: StackWiseConfig,
    stage: int | None = None,
    *,
    steps: int = 5,
    say: Callable[[str], None] = lambda message: None,
) -> Profile:
    """Profile stage `stage` (0-based; null: the one that is planned to take the most memory) in a folder that vanishes.

    The stages before it take one step each, so the rack has grown as in the run; its weights are as good as new. `steps`
    are timed, after one that warms up. Prepared data is kept where the run would keep it. `say` is told what is going on.
    Raises ConfigError, DataError and OutOfMemory.
    """
    config.validate()
    device = pick_device(config.training.device)
    dtype = pick_dtype(config.training.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stackwise-profile-"))
        resolved, _ = resolve(config)
        assert resolved.data.cache_dir is not None
        say("preparing the data")
        corpus = prepare(resolved.data, resolved.data.cache_dir)
        say("planning")
        laid_out = plan_on(config, limited(device_named(own_device(config)), None), corpus=corpus)
        index = _index(laid_out, stage)
        tokenizer = corpus.tokenizer
        resolved, _ = resolve(config, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
        resolved.training.progressive.cache_dir = folder
        stack.enter_context(deterministic(resolved.training.deterministic))
        loader = make_loader(resolved, corpus)
        stack.callback(loader.close)
        listed = stages_of_config(resolved, loader_steps(resolved, loader))
        needed = 2 + steps + TRACED
        wanted = [replace(each, steps=1) for each in listed[:index]]
        wanted.append(replace(listed[index], steps=max(listed[index].steps, needed)))
        objective = objective_of(resolved, tokenizer.special_ids)
        rack = Rack(first_spec(resolved, wanted), seed=resolved.training.seed)
        take_table_of(resolved, rack)
        identity = identity_of(resolved, objective, corpus, device, dtype)
        engine = _Profiled(
            resolved, rack, wanted, loader, device=device, dtype=dtype, identity=identity, objective=objective
        )
        stack.callback(engine.manager.close, remove=True)
        try:
            return _measure(engine, laid_out, index, steps, Path(folder), say)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise engine.out_of_memory(wanted[engine.progress.stage], error) from error


class _Profiled(Engine):
    """An engine whose steps are taken one by one, and which tells of every part of them."""

    listener: Callable[[str], None] | None = None

    @property
    def doing(self) -> str:
        return self._doing

    @doing.setter
    def doing(self, what: str) -> None:
        self._doing = what
        if self.listener is not None:
            self.listener(_PART_OF.get(what, "other"))

    def step(self, stage: Stage) -> None:
        self._train_step(stage)

    def begin(self, stage: Stage) -> None:
        self._begin(stage)

    def skip_rest(self) -> None:
        """Leave the stage as if it had ended."""
        self.progress.stage, self.progress.begun = self.progress.stage + 1, False


def _index(laid_out: Plan, stage: int | None) -> int:
    rows = laid_out.stages
    if stage is None:
        return rows.index(laid_out.largest)
    if not 0 <= stage < len(rows):
        names = ", ".join(f"{number} {row.name}" for number, row in enumerate(rows, 1))
        raise ConfigError(Problem("--stage", "the run has no such stage", stage + 1, names))
    return stage


def _measure(
    engine: _Profiled, laid_out: Plan, index: int, steps: int, folder: Path, say: Callable[[str], None]
) -> Profile:
    for number, before in enumerate(engine.stages[:index], 1):
        say(f"one step of stage {number}, {before.name}, so that the rack grows")
        engine.begin(before)
        engine.step(before)
        engine.skip_rest()
    stage = engine.stages[index]
    engine.begin(stage)
    say(f"stage {index + 1}, {stage.name}: warming up, and counting bytes")
    engine.step(stage)
    say(f"timing {steps} steps")
    before_tokens, before_flops = engine.progress.tokens, engine.progress.flops
    seconds, parts, allocated = _timed(engine, stage, steps)
    tokens, flops = engine.progress.tokens - before_tokens, engine.progress.flops - before_flops
    say(f"tracing {TRACED} steps")
    operators, trace = _traced(engine, stage, folder)
    line = None
    if not engine.config.training.compile:
        say("following the bytes of one step")
        line = _followed(engine, stage)
    planned = laid_out.stages[index]
    device = laid_out.device
    return Profile(
        run_id=engine.config.training.run_id,
        stage=index,
        stages=len(laid_out.stages),
        name=stage.name,
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        steps=steps,
        tokens=tokens // steps,
        seconds=seconds,
        flops=flops / steps,
        peak_rate=device.rate(laid_out.dtype) / device.share,
        parts=parts,
        operators=operators,
        planned=_planned(planned),
        measured=_measured(engine.progress.bytes, line),
        line=line,
        rss_bytes=peak_rss_bytes(),
        allocated=allocated,
        trace=trace,
    )


def _planned(row: StagePlan) -> dict[str, int]:
    return {**row.bytes, "host": row.memory.host_total, "alive": row.peak_bytes}


def _measured(counted: dict[str, Any], line: ByteLine | None) -> dict[str, int | None]:
    items = ("parameters", "gradients", "moments", "activations", "buffers")
    host = sum(counted["host"].values())
    alive = None if line is None else sum(line.peak[1].values())
    return {**{item: counted[item] for item in items}, "host": host, "alive": alive}


def _timed(engine: _Profiled, stage: Stage, steps: int) -> tuple[float, dict[str, float], int | None]:
    """Seconds per step, those of each part, and the peak of CUDA's allocator. A device ends its work at every change."""
    on_cuda = engine.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(engine.device)
    totals, part, since = dict.fromkeys(PARTS, 0.0), "other", time.perf_counter()

    def change(to: str) -> None:
        nonlocal part, since
        if on_cuda:
            torch.cuda.synchronize(engine.device)
        now = time.perf_counter()
        totals[part] += now - since
        part, since = to, now

    with _listening(engine, change):
        change("other")
        totals["other"] = 0.0
        for _ in range(steps):
            engine.step(stage)
            change("other")
    allocated = torch.cuda.max_memory_allocated(engine.device) if on_cuda else None
    return sum(totals.values()) / steps, {name: value / steps for name, value in totals.items()}, allocated


def _traced(engine: _Profiled, stage: Stage, folder: Path) -> tuple[list[Operator], bytes]:
    """The operators by time of their own, the longest first, and the trace. Parts of the step are marked in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = engine.device.type == "cuda"
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    mark: list[Any] = []

    def change(to: str) -> None:
        if mark:
            mark.pop().__exit__(None, None, None)
        mark.append(torch.profiler.record_function(f"part: {to}"))
        mark[-1].__enter__()

    with torch.profiler.profile(activities=activities) as profiler:
        with _listening(engine, change):
            for _ in range(TRACED):
                engine.step(stage)
        if mark:
            mark.pop().__exit__(None, None, None)
    rows = []
    for event in profiler.key_averages():
        if event.key.startswith("part: "):
            continue
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if own > 0:
            rows.append((event.key, event.count / TRACED, own / 1e6 / TRACED))
    rows.sort(key=lambda row: -row[2])
    total = sum(row[2] for row in rows) or 1.0
    path = folder / "trace.json.gz"  # its name says how it is packed
    profiler.export_chrome_trace(str(path))
    operators = [Operator(name, calls, seconds, seconds / total) for name, calls, seconds in rows]
    return operators, path.read_bytes()


def _followed(engine: _Profiled, stage: Stage) -> ByteLine:
    rack, optimizers = engine.rack, engine.optimizers
    assert optimizers is not None
    parked = [t for block in rack.blocks() if block.parked is not None for t in _tensors(block)]
    away = {id(tensor) for tensor in parked}
    names = {name for name, parameter in rack.named_parameters() if id(parameter) in away}
    on_host = optimizers.host_bytes() > 0

    def moments(here: bool) -> Iterator[Tensor]:
        """Those on the device, or those that are kept off it; step counters stay."""
        for name, held in optimizers.state().items():
            yield from (t for t in held.values() if (name in names or (on_host and t.dim() > 0)) != here)

    def elsewhere() -> Iterator[Tensor]:
        yield from parked
        yield from (tensor.grad for tensor in parked if tensor.grad is not None)
        yield from moments(here=False)

    recorder = StepRecorder(
        engine.device,
        [tensor for tensor in _tensors(rack) if id(tensor) not in away],
        lambda: moments(here=True),
        [parameter for parameter in rack.parameters() if parameter.requires_grad],
        elsewhere,
    )
    with recorder, _listening(engine, recorder.part):
        engine.step(stage)
    return recorder.line


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _listening(engine: _Profiled, listener: Callable[[str], None]) -> Iterator[None]:
    engine.listener = listener
    try:
        yield
    finally:
        engine.listener = None
