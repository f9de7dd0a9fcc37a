"""Depth diagnostics of runs of the frontier and of depth as time: what each stack is good for, curriculum by curriculum.

Trains runs of `frontier.py` (its language, equal FLOPs) and of `depth_as_time.py` again, with their first seed, stores
each as a run folder, measures it as `stackwise eval RUN --depth` does, and builds its report. Losses are held against those
of the first time. A run is a record in the output folder; what is there is not run again. In the end it writes the tables
and drawings of docs/depth-diagnostics.md.

    python benchmarks/depth_diagnostics.py --data folder          # folder/input.txt; about 25 CPU minutes
    python benchmarks/depth_diagnostics.py --quick                # short budgets, the language alone
    python benchmarks/depth_diagnostics.py --report-only --out benchmarks/records/depth --docs docs
    python benchmarks/depth_diagnostics.py --only "2 blocks"      # one run

Every process computes on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import depth_as_time as dat
from depth_diagnostics_report import write_report
from depth_runs import Log, store_run
from frontier import job_of
from frontier_budget import config_of
from frontier_run import Job, engine_of, held_out_of, load, rows_in, score
from frontier_scales import FULL, QUICK, Scale
from frontier_variants import END_TO_END, variants
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.data.tokenizers import CharTokenizer
from stackwise.evaluation.depth_file import depth_record, write_depth
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import Denoiser
from stackwise.planning.budget import run_flops, run_tokens
from stackwise.training.device import keep_freed_memory
from stackwise.training.stored import OpenRun
from stackwise.training.validate import validate

ROOT = Path(__file__).resolve().parents[1]
SEED = 1
ROWS = [
    "end to end",
    "append, cached",
    "grow, one by one",
    "cyclic, reset",
    "2 blocks",
    "append, joint phase",
    "random trunk",
    "append",
    "prepend",
]
"""Of the frontier, in the order in which they are run."""
TIMES = ["independent", "end to end", "control: one stack"]
"""Of depth as time."""
STACKS = 3
QUICK_STEPS = 45
"""Of the one-stack control of depth as time, where budgets are short."""
SYMBOLS = "01234567abcdefgh"
"""The language's states and operations as characters."""


@dataclass(frozen=True)
class Row:
    """A run. `kind`: frontier or time."""

    kind: str
    variant: str

    @property
    def name(self) -> str:
        words = self.variant.replace(",", "").replace(":", "").replace(" ", "_")
        return f"{self.kind}-{words}-s{SEED}"


# --- the runs ------------------------------------------------------------------------------------------------------


def frontier_job(variant: str, scale: Scale) -> Job:
    """The frontier's own job."""
    setting = scale.depth
    rows = rows_in(setting.corpus, int(setting.base["training.seq_len"]))
    keys = {**setting.base, **END_TO_END.keys, "training.seed": SEED, "training.max_steps": setting.steps}
    reference = config_of(keys)
    row = next(v for v in variants(setting.stacks) if v.name == variant)
    return job_of(setting, row, "flops", SEED, run_flops(reference, rows), run_tokens(reference))


def run_frontier(row: Row, scale: Scale, runs: Path) -> tuple[OpenRun, dict[str, Any]]:
    """Train a run of the frontier again and store it; with what it was then and is now."""
    job = frontier_job(row.variant, scale)
    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        engine = engine_of(job.corpus, {**job.keys, "training.progressive.cache_dir": cache}, events.append)
        seq_len = engine.config.training.seq_len
        data, held_out = load(job.corpus, seq_len), held_out_of(job.corpus, seq_len)

        def evaluate(rack: Rack, noise: object = None) -> dict[str, Any]:
            total, count = validate(rack, held_out, dtype=engine.dtype)
            return {"loss": total / count, "bits_per_byte": None, "label": "exact"}

        engine.hooks.evaluate = evaluate
        started = time.process_time()
        engine.run()
        seconds = time.process_time() - started
    scores = score(engine.rack, held_out, job.corpus.language, engine.dtype)
    config = engine.config
    config.training.run_id = row.name
    opened = store_run(
        runs / row.name,
        config,
        engine.rack,
        CharTokenizer(SYMBOLS, separated=False),
        [(engine.stages, events)],
        data=data.hash,
        dtype=str(engine.dtype).removeprefix("torch."),
        loss=scores["loss"],
        label="exact",
    )
    split = data.validation
    record = depth_record(opened, split, data=data.hash, batches=10**6)
    write_depth(opened, record)
    return opened, {
        "benchmark": "frontier",
        "job": job.name,
        "loss": scores["loss"],
        "accuracy": scores["accuracy"],
        "floor": floor_of(scale),
        "flops": engine.progress.flops,
        "cpu_seconds": seconds,
        "depth": record,
    }


def floor_of(scale: Scale) -> float:
    """What a model pays on the held-out rows that knows the language, nats per token."""
    corpus = scale.depth.corpus
    language = corpus.language
    assert language is not None
    return language.floor(language.rows(corpus.held_out + 1, 64, seed=200)[: corpus.held_out])


def run_time(row: Row, text: Path, steps: int, runs: Path) -> tuple[OpenRun, dict[str, Any]]:
    """Train a run of depth as time again and store it; stacks that trained alone are put into one rack."""
    scale = dat.FULL
    job = next(
        job
        for job in dat.jobs_of(scale, text)
        if job.variant == row.variant and job.stacks == STACKS and job.seed == SEED
    )
    if steps != scale.steps:
        job = dat.Job(job.variant, job.stacks, job.seed, steps, job.width, job.text, job.sha256)
    corpus, meter = dat.corpus_of(job.text), dat.Meter()
    denoisers, owners, _ = dat.train_row(job, corpus, meter)
    scores = dat.score(denoisers, owners, corpus)
    if row.variant == "independent":
        config, rack = assembled(job, denoisers)
    else:
        n = 1 if row.variant.startswith("control") else STACKS
        config, rack = dat.resolved(dat.keys_of(job, n, steps), corpus), denoisers[0].rack
    config.training.run_id = row.name
    logs: list[Log] = meter.logs
    opened = store_run(
        runs / row.name,
        config,
        rack,
        corpus.tokenizer,
        logs,
        data=corpus.hash,
        dtype="float32" if config.training.dtype == "float32" else "auto",
        loss=scores["nelbo"],
        label="bound",
    )
    record = depth_record(opened, corpus.validation, data=corpus.hash, batches=8, batch_size=128)
    write_depth(opened, record)
    return opened, {
        "benchmark": "depth-as-time",
        "job": job.name,
        "steps": steps,
        "loss": scores["nelbo"],
        "flops": meter.flops,
        "cpu_seconds": meter.seconds,
        "depth": record,
    }


def assembled(job: dat.Job, denoisers: list[Denoiser]) -> tuple[StackWiseConfig, Rack]:
    """One rack of the models of all intervals, lightest noise next to the head, each stack with ends of its own."""
    p = "training.progressive."
    keys = {
        **dat.keys_of(job, len(denoisers), job.steps, "uniform"),
        p + "enabled": True,
        p + "building_mode": "independent",
        p + "independent_io": "own",
        p + "joint_tuning": False,
    }
    config = dat.resolved(keys, dat.corpus_of(job.text))
    listed = stages(config)
    spec = stage_specs(config, listed, first_spec(config, listed), "fp32")[-1]
    rack = Rack(spec, seed=job.seed)
    with torch.no_grad():
        for distance, denoiser in enumerate(denoisers):
            alone, stack = denoiser.rack, rack.stacks[len(denoisers) - 1 - distance]
            stack.blocks.load_state_dict(alone.stacks[0].blocks.state_dict())
            if stack.io is not None:
                stack.io.copy_from(alone)
            else:
                for name in ("embedding", "norm", "head"):
                    getattr(rack, name).load_state_dict(getattr(alone, name).state_dict())
    return config, rack.eval()


# --- the program -----------------------------------------------------------------------------------------------------


def work_through(
    rows: list[Row], options: argparse.Namespace, folder: Path, show: Callable[[str], None]
) -> None:
    """Run what has no record yet."""
    from stackwise.tracking.report import build_report

    torch.set_num_threads(1)
    keep_freed_memory()
    runs = options.runs
    runs.mkdir(parents=True, exist_ok=True)
    for row in rows:
        path = folder / f"{row.name}.json"
        if path.exists():
            continue
        if row.kind == "frontier":
            opened, record = run_frontier(row, QUICK if options.quick else FULL, runs)
        else:
            steps = options.steps or (QUICK_STEPS if options.quick else dat.FULL.steps)
            opened, record = run_time(row, options.data / "input.txt", steps, runs)
        record["depth"]["run"] = row.name
        record = {"row": row.variant, "seed": SEED, **record}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(path)
        show(
            f"{row.name}: loss {record['loss']:.4f}, {record['cpu_seconds']:.0f} CPU s; {build_report(opened.folder.path)}"
        )


def first_loss(record: dict[str, Any]) -> float | None:
    """The loss of the same run in the records of its benchmark; null where it was not run with these budgets."""
    path = ROOT / "benchmarks" / "records" / record["benchmark"] / "full" / f"{record['job']}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return float(found["loss"] if "loss" in found else found["nelbo"])


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """The runs that are asked for."""
    listed = [Row("frontier", name) for name in ROWS]
    if options.data is not None or options.report_only:
        listed[5:5] = [Row("time", name) for name in TIMES]
    for row in listed:
        if options.only is None or row.variant == options.only:
            yield row


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with input.txt, for depth as time")
    parser.add_argument("--quick", action="store_true", help="short budgets")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"depth as time: steps of the one-stack control, whose FLOPs are the budget ({dat.FULL.steps})",
    )
    parser.add_argument("--only", metavar="ROW", help="one row")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "depth-records", help="folder of records")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "depth", help="folder of run folders")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--docs", type=Path, help="folder of the page and drawing (default: that of the records)"
    )
    options = parser.parse_args(argv)
    if options.data is not None and not (options.data / "input.txt").is_file():
        raise SystemExit(f"--data {options.data}: there is no file input.txt in it")
    rows = list(rows_of(options))
    if not rows:
        known = ", ".join([*ROWS, *TIMES])
        raise SystemExit(f"--only {options.only}: no such row; there are {known}")
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        work_through(rows, options, options.out, show)
    paths = [options.out / f"{row.name}.json" for row in rows]
    records = [json.loads(path.read_text()) for path in paths if path.exists()]
    for line in write_report(options.docs or options.out, records, first_loss):
        show(line)


if __name__ == "__main__":
    main()
