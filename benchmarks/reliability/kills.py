"""kill -9 at random times: a run that was killed over and over must end as the one that nobody disturbed.

A child trains, is killed by SIGKILL after a random time, and another one takes up the run folder, until one comes to the
end. Then the digest of the run (`runs.digest`) must be the one of the undisturbed run. After every kill the newest commit
must be whole, and no more steps may be lost than lie between two saves; twice as many where saving is asynchronous, which
is so in every second run.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.children import RAM_DISK, Spent, end_of, fork, prepare_to_fork
from reliability.runs import CASES, Case, config_of, differences, digest, last_step, outcome_of
from stackwise.checkpoint.store import Store
from stackwise.config.root import StackWiseConfig
from stackwise.training.run import train

DISK_SHARE = 16
"""One run of so many is on the disk; the others are on the RAM disk, where a kill costs a tenth of a second."""
SAVES = 2
"""A child is killed at the latest after the time of about so many saves."""
SLOWER = 1.1
"""A child gets so many times longer for every one before it that got nowhere: the machine may be busier than before."""
PATIENCE = 400
"""Kills after which a run that has not come to its end is let go: it does not get ahead."""


@dataclass
class Result:
    """What became of one run."""

    case: str
    index: int
    asynchronous: bool
    kills: int = 0
    redone: int = 0
    """Most steps that one kill has cost."""
    at: Counter[str] = field(default_factory=Counter)
    """Where the kills fell: before the first step of the child, or after it."""
    failures: list[str] = field(default_factory=list)


class Kills:
    """Runs of `cases` below `places` (RAM disk, disk), killed at times that follow from `seed`."""

    def __init__(self, cases: Sequence[Case], seed: int, places: tuple[Path, Path]) -> None:
        prepare_to_fork()
        self.cases, self.seed = cases, seed
        self._folders = [Path(tempfile.mkdtemp(prefix="stackwise-kills-", dir=place)) for place in places]
        self._data = self._folders[0] / "data"
        self._data.mkdir()
        self._wanted: dict[str, dict[str, Any]] = {}
        self._spans: dict[tuple[str, int], tuple[float, float]] = {}

    def close(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def undisturbed(self, case: Case, place: int) -> None:
        """Train the case without a kill in both ways of saving: what it must come to, and how long its parts take."""
        folder = self._folders[place]
        run_dir = folder / "undisturbed"
        spans = []
        for asynchronous in (True, False):
            config = self._config(case, folder, "undisturbed", asynchronous)
            begin = time.perf_counter()
            steps = train(config, sinks=[], report=False)["steps"]
            middle = time.perf_counter()
            train(config, sinks=[], report=False)  # nothing is left to do: the time of a start
            start = time.perf_counter() - middle
            spans.append((start, SAVES * (middle - begin - start) / steps * config.checkpoint.save_interval))
            found = outcome_of(run_dir, case)
            unlike = list(differences(found, self._wanted.setdefault(case.name, found)))
            if unlike:
                raise RuntimeError(
                    f"{case.name}: two undisturbed runs differ, so no other can be judged: {unlike}"
                )
            shutil.rmtree(run_dir)
        self._spans[case.name, place] = min(spans)  # the first also warms up what a child will do

    def run(self, index: int, most: int = PATIENCE) -> Result:
        """Run number `index`, killed until it is done or `most` kills were made (it then ends undisturbed)."""
        case = self.cases[index % len(self.cases)]
        place = int(index // len(self.cases) % DISK_SHARE == DISK_SHARE - 1)
        if (case.name, place) not in self._spans:
            self.undisturbed(case, place)
        start, span = self._spans[case.name, place]
        folder = self._folders[place]
        config = self._config(case, folder, f"run-{index}", asynchronous=index // len(self.cases) % 2 == 0)
        run_dir, log = folder / f"run-{index}", folder / f"run-{index}.error"
        draw = random.Random(f"{self.seed}/{index}")
        result = Result(case.name, index, config.checkpoint.asynchronous is True)
        code, stalled = -9, 0
        while code == -9:
            before = last_step(run_dir)
            pid = fork(lambda: train(config, sinks=[], report=False), log)
            # A tenth of the kills fall into the start and what it repairs; without a limit the run could not end.
            late = start * draw.random() if draw.random() < 0.1 else start + span * draw.random()
            late *= SLOWER**stalled
            code = end_of(pid, late if result.kills < most else None)
            if code == -9:
                result.kills += 1
                ahead = last_step(run_dir) > before
                result.at["training and saving" if ahead else "start"] += 1
                stalled = 0 if ahead else stalled + 1
                self._look(run_dir, config, result)
        if code != 0:
            text = log.read_text().strip() if log.exists() else "no traceback"
            result.failures.append(f"a child ended with {code} after {result.kills} kills: {text}")
        else:
            try:
                found, wanted = outcome_of(run_dir, case), self._wanted[case.name]
                if digest(found) != digest(wanted):
                    unlike = "; ".join(itertools.islice(differences(found, wanted), 5))
                    result.failures.append(f"after {result.kills} kills another end: {unlike}")
            except Exception as error:  # noqa: BLE001 whatever cannot be read is a failure to report
                result.failures.append(f"after {result.kills} kills: {error!r}")
        shutil.rmtree(run_dir, ignore_errors=True)
        return result

    def _look(self, run_dir: Path, config: StackWiseConfig, result: Result) -> None:
        """The newest commit must be whole, and near to where the run was."""
        try:
            store = Store(run_dir / "store")
            commit = store.latest()
            if commit is not None:
                store.verify(commit)
        except Exception as error:  # noqa: BLE001 as above
            result.failures.append(f"after kill {result.kills}: {error!r}")
            return
        lost = last_step(run_dir) - (commit.step if commit is not None else 0)
        result.redone = max(result.redone, lost)
        # with asynchronous saving one save may be in flight
        allowed = config.checkpoint.save_interval * (2 if config.checkpoint.asynchronous else 1)
        if lost > allowed:
            result.failures.append(f"kill {result.kills} costs {lost} steps, {allowed} at most")

    def _config(self, case: Case, folder: Path, run_id: str, asynchronous: bool) -> StackWiseConfig:
        return config_of(case, folder, self._data, run_id, **{"checkpoint.asynchronous": asynchronous})


def run(
    kills: int,
    seed: int,
    *,
    seconds: float = float("inf"),
    cases: Sequence[Case] = CASES,
    first: int = 0,
    disk: Path | None = None,
) -> dict[str, Any]:
    """Make at least `kills` kills, or as many as fit into `seconds`; the record.

    `first`: number of the first run, to repeat one. `disk`: a folder on a disk, by default the system's for temporary
    files.
    """
    disk = disk or Path(tempfile.gettempdir())
    ram = RAM_DISK if RAM_DISK.is_dir() else disk
    made = Kills(cases, seed, (ram, disk))
    results: list[Result] = []
    spent = Spent()
    try:
        while (done := sum(result.kills for result in results)) < kills:
            if spent.since()["seconds"] > seconds:
                break
            index = first + len(results)
            results.append(made.run(index, min(PATIENCE, kills - done)))
            for failure in results[-1].failures:
                case = results[-1].case
                print(f"kills: run {index} ({case}), seed {seed}: {failure}\n  again: {again(seed, index)}")
    finally:
        made.close()
    return {**record(results, kills, seed, cases), **spent.since()}


def again(seed: int, index: int) -> str:
    """The command that makes the same run again: the same delays, though a machine never takes the same time twice."""
    return f"python benchmarks/faults.py --only kills --seed {seed} --first {index} --kills 50"


def record(results: Sequence[Result], asked: int, seed: int, cases: Sequence[Case]) -> dict[str, Any]:
    """The counts, by case."""
    rows = []
    for case in cases:
        own = [result for result in results if result.case == case.name]
        rows.append(
            {
                "case": case.name,
                "says": case.says,
                "runs": len(own),
                "kills": sum(result.kills for result in own),
                "inexact": sum(bool(result.failures) for result in own),
                "redone": [
                    max((r.redone for r in own if r.asynchronous is way), default=0) for way in (False, True)
                ],
                "at": dict(sum((result.at for result in own), Counter())),
            }
        )
    failures = [
        f"run {result.index} ({result.case}): {line}; again: {again(seed, result.index)}"
        for result in results
        for line in result.failures
    ]
    return {
        "asynchronous": sum(result.kills for result in results if result.asynchronous),
        "asked": asked,
        "seed": seed,
        "kills": sum(result.kills for result in results),
        "runs": len(results),
        "on_disk": sum(
            result.kills for result in results if result.index // len(cases) % DISK_SHARE == DISK_SHARE - 1
        ),
        "cases": rows,
        "failures": failures,
    }
