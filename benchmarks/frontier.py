"""Every curriculum against end-to-end training: validation loss, cost, and the bytes that training holds.

All curricula train on the same rows for the same FLOPs, and the same tokens, as end-to-end training, beside controls
that a curriculum must beat to have gained anything. Two corpora: a language made here in which depth pays
(`depth_corpus.py`), and a text file where one is given. A run is a record in the output folder; what is there is not
run again, so the program can be stopped and started at any time. In the end it writes the tables, the verdicts and the
plot of the documentation.

    python benchmarks/frontier.py --quick                  # one seed, short budgets: minutes, shows the shape of things
    python benchmarks/frontier.py                          # three seeds: one to two hours on two cores
    python benchmarks/frontier.py --data folder            # with folder/input.txt, tinyshakespeare in the figures
    python benchmarks/frontier.py --report-only            # tables and plot from the records that are there
    python benchmarks/frontier.py --tune                   # instead: the learning-rate trials behind the chosen rates

CPU seconds are of the training process, evaluation left out; every process computes on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from frontier_budget import batch_for, config_of, fit
from frontier_bytes import Measurement, measure, measurements
from frontier_report import write_report
from frontier_run import Job, expected_flops, rows_in, run, save
from frontier_scales import FULL, QUICK, RATES, TRIALS, Scale, Setting, settings_of
from frontier_variants import END_TO_END, Variant, variants
from stackwise.planning.budget import run_flops, run_tokens

ROOT = Path(__file__).resolve().parents[1]


def jobs_of(setting: Setting, seed: int) -> Iterator[Job]:
    """The runs of one seed on one corpus, each with its budget."""
    seq_len = int(setting.base["training.seq_len"])
    rows = rows_in(setting.corpus, seq_len)
    base = {**setting.base, "training.seed": seed}
    reference = config_of({**base, **END_TO_END.keys, "training.max_steps": setting.steps})
    flops, tokens = run_flops(reference, rows), run_tokens(reference)
    for variant in variants(setting.stacks):
        if setting.corpus.path is not None and not variant.text:
            continue
        for axis in variant.axes:
            if axis == "tokens" and (variant is END_TO_END or not setting.equal_tokens):
                continue
            yield job_of(setting, variant, axis, seed, flops, tokens)


def job_of(
    setting: Setting,
    variant: Variant,
    axis: str,
    seed: int,
    flops: float,
    tokens: int,
    rate: float | None = None,
) -> Job:
    """A run with the budget that `axis` names: as many FLOPs (times the variant's share) or tokens as given."""
    rows = rows_in(setting.corpus, int(setting.base["training.seq_len"]))
    factor = RATES[setting.corpus.name].get(variant.name, 1.0) if rate is None else rate
    keys = {**setting.base, "training.seed": seed, **variant.keys}
    for name in ("training.optimizer.lr", "training.optimizer.adam_lr"):
        keys[name] = keys[name] * factor
    if axis == "tokens":
        keys = fit(keys, variant.steps_key, tokens, lambda config: float(run_tokens(config)))
    else:
        if variant.big_batch:
            keys = batch_for(keys, setting.steps, flops, rows)
        keys = fit(keys, variant.steps_key, flops * variant.share, lambda config: run_flops(config, rows))
    return Job(setting.corpus, variant.name, axis, keys, expected_flops(setting.corpus, keys))


def trials_of(setting: Setting) -> Iterator[Job]:
    """Every variant at every rate of TRIALS, on a seed that no table uses."""
    rows = rows_in(setting.corpus, int(setting.base["training.seq_len"]))
    base = {**setting.base, "training.seed": 0}
    flops = run_flops(config_of({**base, **END_TO_END.keys, "training.max_steps": setting.steps}), rows)
    for variant in variants(setting.stacks):
        for rate in TRIALS:
            yield job_of(setting, variant, "flops", 0, flops, 0, rate)


def work_through(
    jobs: list[Job | Measurement], folder: Path, workers: int, show: Callable[[str], None]
) -> list[str]:
    """Run what has no record yet. The others go on when one fails. Returns: the names of those that failed."""
    missing = [job for job in jobs if not (folder / f"{job.name}.json").exists()]
    show(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done before, {workers} at a time")
    started, done, total = time.monotonic(), 0.0, sum(job.flops for job in missing)

    def note(job: Job | Measurement, record: dict[str, Any]) -> None:
        nonlocal done
        save(record, folder)
        done += job.flops
        spent = time.monotonic() - started
        left = spent * (total - done) / max(done, 1.0)
        show(
            f"{job.name.rsplit('-', 1)[0]}: {record['line']}, {record['cpu_seconds']:.0f} CPU s; {left / 60:.0f} min left"
        )

    def fail(job: Job | Measurement, error: Exception) -> None:
        show(f"{job.name.rsplit('-', 1)[0]} FAILED: {type(error).__name__}: {error}")
        failed.append(job.name)

    failed: list[str] = []
    if workers == 1:
        for job in missing:
            try:
                note(job, do(job))
            except Exception as error:  # noqa: BLE001
                fail(job, error)
        return failed
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(do, job): job for job in missing}
        try:
            for future in as_completed(waiting):
                error = future.exception()
                if isinstance(error, Exception) and not isinstance(error, BrokenExecutor):
                    fail(waiting[future], error)
                else:
                    note(waiting[future], future.result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return failed


def do(job: Job | Measurement) -> dict[str, Any]:
    """One unit of work, in whatever process."""
    return run(job) if isinstance(job, Job) else measure(job)


def records_of(jobs: list[Job | Measurement], folder: Path) -> list[dict[str, Any]]:
    """The records of those jobs that have run."""
    paths = [folder / f"{job.name}.json" for job in jobs]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, short budgets, equal FLOPs only")
    parser.add_argument("--data", type=Path, help="folder with input.txt, the text of the second corpus")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "frontier", help="folder of the records")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--tune", action="store_true", help="learning-rate trials instead of the runs")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--docs",
        type=Path,
        help="folder of frontier.md and frontier.png (full: docs, quick: the output folder)",
    )
    options = parser.parse_args(argv)
    return go(QUICK if options.quick else FULL, options, show)


def go(scale: Scale, options: argparse.Namespace, show: Callable[[str], None]) -> list[dict[str, Any]]:
    folder = options.out / (scale.name + "-trials" * options.tune)
    folder.mkdir(parents=True, exist_ok=True)
    text = None if options.data is None else options.data / "input.txt"
    if text is None:
        show("no --data FOLDER: the character corpus (FOLDER/input.txt) is left out")
    elif not text.is_file():
        raise SystemExit(f"--data {options.data}: there is no file input.txt in it")
    settings = settings_of(scale, text)
    jobs: list[Job | Measurement] = []
    for setting in settings:
        if options.tune:
            jobs += trials_of(setting)
        else:
            jobs += [job for seed in scale.seeds for job in jobs_of(setting, seed)]
    if not options.tune:
        jobs += measurements(scale, settings[0])
    failed = [] if options.report_only else work_through(jobs, folder, options.jobs, show)
    records = records_of(jobs, folder)
    if options.tune:
        for line in best_rates(records):
            show(line)
        return records
    docs = options.docs or (ROOT / "docs" if scale is FULL else folder)
    for line in write_report(docs, scale, settings, records):
        show(line)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed and are missing above: {', '.join(failed)}")
    return records


def best_rates(records: list[dict[str, Any]]) -> list[str]:
    """Losses of the trials by variant, the best rate first."""
    lines = []
    names = dict.fromkeys((r["job"]["corpus"]["name"], r["job"]["variant"]) for r in records)
    for corpus, variant in names:
        found = [r for r in records if (r["job"]["corpus"]["name"], r["job"]["variant"]) == (corpus, variant)]
        pairs = sorted((r["loss"], r["job"]["keys"]["training.optimizer.lr"]) for r in found)
        lines.append(f"{corpus}, {variant}: " + ", ".join(f"{loss:.4f} at {rate:g}" for loss, rate in pairs))
    return lines


if __name__ == "__main__":
    main()
