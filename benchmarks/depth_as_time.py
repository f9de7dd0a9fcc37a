"""Depth as time: independent stacks, each a denoiser of its own share of noise, against end-to-end masked diffusion.

Everything trains on the characters of one text file for the same FLOPs: N stacks of 3 blocks end to end on all noise;
N independent stacks on N intervals of noise, cold or from a shared warm start; the right-to-left curriculum; and the
controls that depth as time must beat to have gained anything: one stack-sized model on all noise for the whole budget,
and stacks that own random shares of noise. A run is a record in the output folder; what is there is not run again.

    python benchmarks/depth_as_time.py --data folder --quick       # folder/input.txt; one seed, short: minutes
    python benchmarks/depth_as_time.py --data folder               # three seeds: about an hour on two cores
    python benchmarks/depth_as_time.py --data folder --report-only # table and plot from the records that are there

NELBO in nats per character by the count estimator: the held-out tenth is cut into windows; in each of 4 passes window i
hides exactly 1 + (perm[i] mod 64) random characters; mean over windows and passes of the mean masked loss.
CPU seconds are of the training process, evaluation left out; every process computes on one thread.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn import functional as F

from depth_as_time_report import write_report
from frontier_budget import config_of
from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec
from stackwise.curriculum.stage import Stage
from stackwise.data.corpus import Corpus
from stackwise.data.loader import TokenLoader
from stackwise.data.prepare import prepare
from stackwise.model.describe import rack_spec
from stackwise.model.flops import step_flops
from stackwise.model.rack import Rack
from stackwise.objectives.base import Noise
from stackwise.objectives.build import objective_of
from stackwise.objectives.denoiser import Denoiser, denoiser_of
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.intervals import Intervals
from stackwise.training.device import keep_freed_memory, pick_device, pick_dtype
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine

ROOT = Path(__file__).resolve().parents[1]
VERSION = 3
LENGTH = 64
BLOCKS = 3
BATCH = 64
PASSES = 4
Keys = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """`steps`: of the one-stack control, whose FLOPs are everybody's budget. `stacks`: numbers of stacks; all rows are
    run with `middle` of them, end to end and the warm start with each."""

    name: str
    seeds: tuple[int, ...]
    steps: int
    stacks: tuple[int, ...] = (2, 3, 4)
    middle: int = 3
    width: int = 16


FULL = Scale("full", seeds=(1, 2, 3), steps=4500)
QUICK = Scale("quick", seeds=(1,), steps=450)


@dataclass(frozen=True)
class Variant:
    """How a budget is spent. `warm`: share of it that one stack trains on all noise before it is copied.

    `io` false: after the warm start embedding, final norm and head rest, and all stacks share them. `split`: intervals,
    or random (shares of noise at random). `lean`: an interval gets what is left in proportion to (hidden share)^-lean.
    `weight`: the key objective.weight. `each`: for every number of stacks; `once`: for one seed.
    """

    name: str
    says: str
    kind: str = "independent"
    warm: float = 0.0
    io: bool = True
    split: str = "intervals"
    overlap: float = 0.05
    lean: float = 0.5
    weight: str = "uniform"
    each: bool = False
    once: bool = False


WARM = 0.6
VARIANTS = [
    Variant("end to end", "all stacks as one model, all noise", "whole", each=True),
    Variant("control: one stack", "a model of one stack, all noise, the whole budget", "control"),
    Variant(
        "independent",
        f"one stack on all noise for {WARM:.0%} of the budget, then a copy of it for every interval, widened by 5 % on "
        "both sides; the learning rate falls from where the warm start left it to zero. Lighter noise gets more of the "
        "rest, as the inverse root of its mean hidden share",
        warm=WARM,
        each=True,
    ),
    Variant(
        "control: random partition",
        "as independent, but every stack owns random shares of noise, and all get the same budget",
        warm=WARM,
        split="random",
        lean=0.0,
    ),
    Variant(
        "independent, shared ends",
        "embedding, final norm and head rest after the warm start",
        warm=WARM,
        io=False,
        once=True,
    ),
    Variant("independent, cold", "each stack on its interval from its own random start", once=True),
    Variant(
        "right to left",
        "prepend: each new stack on its interval, through the frozen ones behind it",
        "prepend",
        once=True,
    ),
    Variant(
        "end to end, rows alike",
        "every row counts the same, as in the bound, and not every hidden character",
        "whole",
        weight="nelbo",
    ),
    Variant(
        "control: one stack, rows alike",
        "every row counts the same, as in the bound, and not every hidden character",
        "control",
        weight="nelbo",
    ),
]


@dataclass(frozen=True)
class Job:
    """One row of one seed."""

    variant: str
    stacks: int
    seed: int
    steps: int
    width: int
    text: str
    sha256: str

    @property
    def name(self) -> str:
        """The record's file name: who it is, and a hash of everything that decides its numbers."""
        row = next(v for v in VARIANTS if v.name == self.variant)
        known = [VERSION, asdict(row), self.stacks, self.seed, self.steps, self.width, self.sha256]
        words = self.variant.replace(",", "").replace(":", "").replace(" ", "_")
        return f"{words}-{self.stacks}-s{self.seed}-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:10]}"


def jobs_of(scale: Scale, text: Path) -> list[Job]:
    """All runs, seed by seed, from the middle number of stacks on."""
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    wanted = [
        (seed, n != scale.middle, n, index)
        for seed in scale.seeds
        for n in scale.stacks
        for index, variant in enumerate(VARIANTS)
        if (n == scale.middle or variant.each) and (seed == scale.seeds[0] or not variant.once)
    ]
    return [
        Job(VARIANTS[index].name, n, seed, scale.steps, scale.width, str(text), digest)
        for seed, _, n, index in sorted(wanted)
    ]


# --- training ----------------------------------------------------------------------------------------------------


def keys_of(job: Job, stacks: int, steps: int, weight: str = "nelbo") -> Keys:
    """A model of `stacks` stacks, as the preset diffusion-char but narrower."""
    return {
        "model.d_model": job.width,
        "model.n_heads": 2,
        "model.d_ff": 3 * job.width,
        "model.max_seq_len": LENGTH,
        "model.architecture.n_stacks": stacks,
        "model.architecture.blocks_per_stack": BLOCKS,
        "model.attention_preset": "bert_style",
        "model.qk_norm": True,
        "model.norm_eps": 1e-6,
        "model.rope_theta": 200.0,
        "model.short_conv": 3,
        "model.embedding_norm": True,
        "model.tie_embeddings": False,
        "model.zero_init_outputs": True,
        "training.seq_len": LENGTH,
        "training.batch_size": BATCH,
        "training.max_steps": steps,
        "training.lr_schedule": "linear",
        "training.min_lr_ratio": 0.0,
        "training.max_grad_norm": 0.0,
        "training.device": "cpu",
        "training.seed": job.seed,
        "training.optimizer.optimizer_type": "Muon",
        "training.optimizer.lr": 0.02,
        "training.optimizer.adam_lr": 0.01,
        "training.optimizer.momentum": 0.95,
        "training.optimizer.weight_decay": 0.03,
        "training.progressive.enabled": False,
        "training.progressive.training_objective": "diffusion",
        "objective.weight": weight,
        "data.source": "text",
        "data.path": job.text,
        "data.tokenizer": "char",
    }


@lru_cache(maxsize=1)
def corpus_of(text: str) -> Corpus:
    """The characters of a file, the last tenth held out; kept beside the system's temporary files."""
    import tempfile

    config = config_of({"data.source": "text", "data.path": text, "data.tokenizer": "char"})
    return prepare(config.data, Path(tempfile.gettempdir()) / "stackwise-depth-as-time")


def resolved(keys: Keys, corpus: Corpus) -> StackWiseConfig:
    """The config of some keys for this text."""
    return resolve(config_of(keys), vocab_size=corpus.tokenizer.vocab_size)[0]


class RandomShares(Diffusion):
    """Diffusion over a list of numbers of hidden tokens, `owned`, in place of a range."""

    owned: Tensor

    def corrupt(self, batch: Any, noise: Noise | None = None, counts: Tensor | None = None) -> Any:
        """A number of `owned` for each row, by the row's time."""
        places = batch["places"].double() * 0.6180339887498949 % 1
        return super().corrupt(batch, counts=self.owned[(places * len(self.owned)).long()])


class Meter:
    """What the stages of a job have cost together, and the highest peak of one."""

    def __init__(self) -> None:
        self.flops = self.tokens = self.seconds = 0.0
        self.bytes: dict[str, int] = {"peak": 0}
        self.logs: list[tuple[list[Stage], list[dict[str, Any]]]] = []
        """Of every engine that ran, its stages and events."""

    def add(self, other: Meter) -> None:
        """Add what was paid elsewhere."""
        self.flops, self.tokens = self.flops + other.flops, self.tokens + other.tokens
        self.seconds += other.seconds
        self.bytes = max(self.bytes, other.bytes, key=lambda b: b["peak"])
        self.logs = [*self.logs, *other.logs]

    def run(self, engine: Engine) -> Rack:
        """Run an engine and add its cost."""
        events: list[dict[str, Any]] = []
        self.logs.append((engine.stages, events))
        engine.hooks.emit = events.append
        started = time.process_time()
        history = engine.run()
        self.seconds += time.process_time() - started
        self.flops += engine.progress.flops
        self.tokens += engine.progress.tokens
        self.bytes = max([self.bytes, *(stage["bytes"] for stage in history)], key=lambda b: b["peak"])
        return engine.rack


def engine_of(
    config: StackWiseConfig,
    corpus: Corpus,
    listed: list[Stage],
    rack: Rack | None = None,
    owned: Tensor | None = None,
) -> Engine:
    """The product's loop over stages of this text."""
    device = pick_device("cpu")
    objective = objective_of(config, corpus.tokenizer.special_ids)
    if owned is not None:
        assert isinstance(objective, Diffusion)
        objective = RandomShares(
            **{f: getattr(objective, f) for f in objective.__dataclass_fields__ if f[0] != "_"}
        )
        objective.owned = owned
    training = config.training
    return Engine(
        config,
        rack or Rack(first_spec(config, listed), seed=training.seed),
        listed,
        TokenLoader(corpus.train, seq_len=LENGTH, batch_size=training.batch_size, seed=training.seed),
        device=device,
        dtype=pick_dtype(training.dtype, device),
        hooks=Hooks(),
        objective=objective,
    )


def cost_of_step(
    job: Job, stacks: int, trained: tuple[str, ...], noise: Noise | None, corpus: Corpus
) -> float:
    """FLOP of one optimizer step of a model that trains on a range of noise."""
    config = resolved(keys_of(job, stacks, 1), corpus)
    spec = rack_spec(config)
    units = {u for u in ("embedding", "norm", "head") if "all" in trained} | {
        f"stack:{s.uid}" for s in spec.stacks
    }
    share = 0.5 if noise is None else sum(noise) / 2
    return step_flops(spec, units, LENGTH, scored=share) * config.training.batch_size * LENGTH


def train_whole(
    job: Job, stacks: int, budget: float, corpus: Corpus, meter: Meter, weight: str = "nelbo"
) -> Denoiser:
    """One model on all noise for a budget."""
    steps = int(budget / cost_of_step(job, stacks, ("all",), None, corpus))
    config = resolved(keys_of(job, stacks, steps, weight), corpus)
    rack = meter.run(engine_of(config, corpus, stages(config)))
    return denoiser_of(rack, config, corpus.tokenizer.special_ids)


def train_prepend(job: Job, weight: str, budget: float, corpus: Corpus, meter: Meter) -> Denoiser:
    """The right-to-left curriculum: the product's own stages, as many steps each as the budget gives."""

    def config_with(steps: int) -> StackWiseConfig:
        p = "training.progressive."
        keys = {p + "enabled": True, p + "building_mode": "prepend", p + "joint_tuning": False}
        return resolved({**keys_of(job, job.stacks, steps, weight), **keys}, corpus)

    from stackwise.curriculum.costs import stage_flops

    config = config_with(100)
    steps = int(budget / sum(stage_flops(config, stages(config))) * 100)
    config = config_with(steps)
    rack = meter.run(engine_of(config, corpus, stages(config)))
    return denoiser_of(rack, config, corpus.tokenizer.special_ids)


@dataclass
class WarmStart:
    """One stack after `steps` steps on all noise, with its moments and what it has cost."""

    rack: Rack
    moments: dict[str, Any]
    steps: int
    meter: Meter


@lru_cache(maxsize=1)
def warm_start(text: str, seed: int, width: int, total: int, share: float, weight: str) -> WarmStart:
    """`share` of a schedule of `total` steps. Every variant of a seed goes on from the same one."""
    job, steps, meter = Job("warm start", 1, seed, total, width, text, ""), int(share * total), Meter()
    corpus = corpus_of(text)
    config = resolved(keys_of(job, 1, steps, weight), corpus)
    engine = engine_of(config, corpus, [Stage("warm start", 1, ("all",), steps, schedule=(0, total))])
    rack = meter.run(engine)
    assert engine.optimizers is not None
    return WarmStart(rack, engine.optimizers.state(), steps, meter)


def train_independent(
    job: Job, variant: Variant, budget: float, corpus: Corpus, meter: Meter
) -> tuple[list[Denoiser], list[int]]:
    """The stacks as models of their own, and for each number of hidden tokens (from 1) the stack that owns it.

    Stacks share no step after the warm start, so they may train anywhere, in any order. Each goes on with the samples
    and the moments of the warm start, and its learning rate falls from there to zero in its own number of steps.
    """
    n, intervals = job.stacks, Intervals.linear(job.stacks)
    owners = [intervals.owner(count / LENGTH) for count in range(1, LENGTH + 1)]
    if variant.split == "random":
        order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(job.seed)).tolist()
        owners = [owners[place] for place in order]
    trained = ("all",) if variant.io else ("stack:0",)
    ranges = [None if variant.split == "random" else intervals.widened(d, variant.overlap) for d in range(n)]
    cost = [cost_of_step(job, 1, trained, noise, corpus) for noise in ranges]
    start, warm_steps = None, 0
    if variant.warm:
        start = warm_start(job.text, job.seed, job.width, job.steps, variant.warm, variant.weight)
        meter.add(start.meter)
        warm_steps = start.steps
    rest = budget - meter.flops
    weights = [(sum(intervals.of(d)) / 2) ** -variant.lean for d in range(n)]
    steps = [int(rest * weight / sum(weights) / each) for weight, each in zip(weights, cost, strict=True)]
    denoisers = []
    for d in range(n):
        config = resolved(keys_of(job, 1, steps[d], variant.weight), corpus)
        before = round(steps[d] * warm_steps / (job.steps - warm_steps))
        stage = Stage(
            f"interval {d + 1}",
            1,
            trained,
            steps[d],
            noise=ranges[d],
            schedule=(before, before + steps[d]),
            data_start=warm_steps,
            optimizer_state="carry" if start else "reset",
        )
        owned = None
        if variant.split == "random":
            owned = torch.tensor([c for c, owner in enumerate(owners, start=1) if owner == d])
        engine = engine_of(config, corpus, [stage], copy.deepcopy(start.rack) if start else None, owned)
        engine.parked = copy.deepcopy(start.moments) if start else {}
        denoisers.append(denoiser_of(meter.run(engine), config, corpus.tokenizer.special_ids))
    return denoisers, owners


# --- scoring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(denoisers: list[Denoiser], owners: list[int], corpus: Corpus) -> dict[str, Any]:
    """NELBO by the count estimator, and the mean masked loss for each number of hidden characters."""
    tokens = torch.from_numpy(corpus.validation.tokens.astype("int64"))
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    generator, losses, counts = torch.Generator().manual_seed(1234), [], []
    for denoiser in denoisers:
        denoiser.rack.eval()
    for _ in range(PASSES):
        count = 1 + torch.randperm(len(windows), generator=generator) % LENGTH
        ranks = torch.rand(windows.shape, generator=generator).argsort(1).argsort(1)
        masks, loss = ranks < count[:, None], torch.zeros(len(windows))
        owner = torch.tensor(owners)[count - 1]
        for d, denoiser in enumerate(denoisers):
            for rows in (owner == d).nonzero().squeeze(1).split(256):
                ids = windows[rows].masked_fill(masks[rows], denoiser.mask_id)
                positions = masks[rows].flatten().nonzero().squeeze(1)
                logits = denoiser.logits(ids, positions)
                nll = F.cross_entropy(logits, windows[rows].flatten()[positions], reduction="none")
                loss[rows] = torch.zeros(len(rows)).index_add_(0, positions // LENGTH, nll) / count[rows]
        losses.append(loss)
        counts.append(count)
    loss, count = torch.cat(losses).double(), torch.cat(counts)
    return {
        "nelbo": float(loss.mean()),
        "by_count": [float(loss[count == n].mean()) for n in range(1, LENGTH + 1)],
        "by_pass": [float(each.double().mean()) for each in losses],
    }


def run_all(jobs: list[Job], folder: Path) -> list[str]:
    """Run jobs of one process in turn and write their records; a line about each."""
    return [write(run(job), folder) for job in jobs]


def write(record: dict[str, Any], folder: Path) -> str:
    """Keep a record, whole or not at all; what it says in one line."""
    job, path = record["job"], folder / f"{record['job']['name']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n")
    part.replace(path)
    return (
        f"{job['variant']}, {job['stacks']} stacks, seed {job['seed']}: "
        f"NELBO {record['nelbo']:.4f}, {record['cpu_seconds']:.0f} CPU s"
    )


def train_row(job: Job, corpus: Corpus, meter: Meter) -> tuple[list[Denoiser], list[int], float]:
    """A row's models, which of them answers for each number of hidden tokens (from 1), and its budget in FLOP."""
    variant = next(v for v in VARIANTS if v.name == job.variant)
    budget = job.steps * cost_of_step(job, 1, ("all",), None, corpus)
    if variant.kind == "independent":
        return *train_independent(job, variant, budget, corpus, meter), budget
    one = [0] * LENGTH
    if variant.kind == "prepend":
        return [train_prepend(job, variant.weight, budget, corpus, meter)], one, budget
    stacks = job.stacks if variant.kind == "whole" else 1
    return [train_whole(job, stacks, budget, corpus, meter, variant.weight)], one, budget


def run(job: Job) -> dict[str, Any]:
    """Train and score one job; the record."""
    torch.set_num_threads(1)
    keep_freed_memory()
    corpus, meter = corpus_of(job.text), Meter()
    denoisers, owners, budget = train_row(job, corpus, meter)
    if not 0.95 * budget <= meter.flops <= 1.005 * budget:
        raise RuntimeError(
            f"the run cost {meter.flops / 1e9:.1f} GFLOP, and its budget was {budget / 1e9:.1f}"
        )
    return {
        "job": {**asdict(job), "text": Path(job.text).name, "name": job.name},
        **score(denoisers, owners, corpus),
        "flops": meter.flops,
        "tokens": meter.tokens,
        "cpu_seconds": meter.seconds,
        "bytes": meter.bytes,
        "parameters": sum(denoiser.rack.get_parameter_count() for denoiser in denoisers),
    }


# --- the program -------------------------------------------------------------------------------------------------


def work_through(jobs: list[Job], folder: Path, workers: int, show: Callable[[str], None]) -> None:
    """Run what has no record yet; jobs with the same warm start follow each other in one process."""
    missing = [job for job in jobs if not (folder / f"{job.name}.json").exists()]
    show(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done before, {workers} at a time")
    groups: dict[Any, list[Job]] = {}
    for job in missing:
        warm = next(v.warm for v in VARIANTS if v.name == job.variant)
        groups.setdefault((job.seed, warm) if warm else job, []).append(job)
    started, done = time.monotonic(), 0
    for lines in _done(list(groups.values()), folder, workers):
        done += len(lines)
        left = (time.monotonic() - started) / done * (len(missing) - done)
        for line in lines:
            show(f"{line}; about {left / 60:.0f} min left")


def _done(groups: list[list[Job]], folder: Path, workers: int) -> Iterator[list[str]]:
    if workers == 1:
        for jobs in groups:
            yield run_all(jobs, folder)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_all, jobs, folder) for jobs in groups]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with input.txt")
    parser.add_argument("--quick", action="store_true", help="one seed, short budgets")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "depth-as-time", help="folder of the records"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--docs", type=Path, help="folder of the page and plot (full: docs, quick: the output folder)"
    )
    options = parser.parse_args(argv)
    return go(QUICK if options.quick else FULL, options, show)


def go(scale: Scale, options: argparse.Namespace, show: Callable[[str], None]) -> list[dict[str, Any]]:
    text = options.data / "input.txt"
    if not text.is_file():
        raise SystemExit(f"--data {options.data}: there is no file input.txt in it")
    folder = options.out / scale.name
    folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(scale, text)
    if not options.report_only:
        work_through(jobs, folder, options.jobs, show)
    paths = [folder / f"{job.name}.json" for job in jobs]
    records = [json.loads(path.read_text()) for path in paths if path.exists()]
    docs = options.docs or (ROOT / "docs" if scale is FULL else folder)
    for line in write_report(docs, scale.name, VARIANTS, records):
        show(line)
    return records


if __name__ == "__main__":
    main()
