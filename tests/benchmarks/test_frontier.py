"""The frontier runs, resumes where it stopped, and its language has the entropy it claims."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# --- the language ------------------------------------------------------------------------------------------------


def probabilities(language: Any, length: int) -> dict[tuple[int, ...], float]:
    """Every row that can occur, from the rules in words."""
    table = language.table
    found: dict[tuple[int, ...], float] = {}

    def go(row: tuple[int, ...], state: int, chance: float) -> None:
        if len(row) == length:
            found[row] = found.get(row, 0.0) + chance
            return
        draws = chance
        if row[-1] >= language.states:  # after an operation the state may be shown
            go((*row, state), state, chance * language.reveal)
            draws = chance * (1 - language.reveal)
        for operation in range(language.operations):
            go((*row, language.states + operation), int(table[operation][state]), draws / language.operations)

    for state in range(language.states):
        go((state,), state, 1 / language.states)
    return found


def test_the_entropy_is_that_of_all_rows_written_out() -> None:
    from depth_corpus import Automaton

    language = Automaton(states=3, operations=2, reveal=0.3, seed=5)
    rows = probabilities(language, 6)
    assert sum(rows.values()) == pytest.approx(1)
    entropy = -sum(p * math.log(p) for p in rows.values()) - math.log(3)  # the first token is no target
    assert language.entropy(6) == pytest.approx(entropy / 5)


def test_rows_occur_as_often_as_they_should_and_floor_is_their_cost() -> None:
    from depth_corpus import Automaton

    language = Automaton(states=2, operations=2, reveal=0.4, seed=1)
    expected = probabilities(language, 4)
    rows = language.rows(20000, 4, seed=3)
    drawn = {tuple(row): int(n) for row, n in zip(*np.unique(rows, axis=0, return_counts=True), strict=True)}
    assert set(drawn) == set(expected)
    for row, chance in expected.items():
        spread = math.sqrt(20000 * chance * (1 - chance))
        assert abs(drawn[row] - 20000 * chance) < 5 * spread
    cost = -sum(n * math.log(2 * expected[row]) for row, n in drawn.items()) / (20000 * 3)
    assert language.floor(rows) == pytest.approx(cost)
    assert not np.array_equal(rows, language.rows(20000, 4, seed=4))


def test_distances_count_the_operations_since_the_last_state() -> None:
    from depth_corpus import Automaton

    language = Automaton()
    row = np.array([[3, 12, 9, 6, 8, 15, 15, 0, 9]])
    assert language.distances(row).tolist() == [[0, 0, 0, 2, 0, 0, 0, 3, 0]]


def test_a_split_is_cut_into_its_rows() -> None:
    from depth_corpus import Automaton
    from stackwise.data.packing import make_rows

    language = Automaton()
    rows = make_rows(language.split(5, 12, seed=1), 12)
    assert rows.n_rows == 5
    batch = rows.batch(np.arange(5))
    assert np.array_equal(batch["input_ids"].numpy(), language.rows(6, 12, seed=1)[:5])
    assert (batch["next_ids"] == -100).all(), "nothing is predicted across rows"
    assert "document_ids" not in batch


# --- the program -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program with budgets of a few steps."""
    import frontier
    from frontier_run import Corpus
    from frontier_scales import DEPTH, Scale, Setting

    changes = {
        "model.d_model": 16,
        "model.architecture.n_stacks": 4,
        "model.d_ff": 32,
        "model.max_seq_len": 32,
        "training.seq_len": 32,
        "training.batch_size": 2,
        "training.warmup_steps": 1,
        "training.dtype": "float32",
    }
    setting = Setting(Corpus("depth", rows=12, held_out=8), {**DEPTH, **changes}, steps=10)
    scale = Scale("quick", (1,), setting, 4, (2, 3), cache_stacks=3, cache_steps=4, cache_rows=8)
    monkeypatch.setattr(frontier, "QUICK", scale)
    return frontier


FEW = (
    "end to end",
    "append, streamed, cached",
    "cyclic, carried",
    "grow, 85 % FLOPs",
    "2 blocks, larger batch",
)


@pytest.fixture
def few(small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same with one variant of each kind and one sweep over depths."""
    import frontier_bytes
    import frontier_report
    from frontier_variants import variants

    for module in (small, frontier_report):
        monkeypatch.setattr(module, "variants", lambda stacks: [v for v in variants(stacks) if v.name in FEW])
    sweeps = {name: keys for name, keys in frontier_bytes.SWEEPS.items() if "streamed, cached" in name}
    monkeypatch.setattr(frontier_bytes, "SWEEPS", sweeps)
    return small


def test_it_runs_writes_its_page_and_resumes(few: ModuleType, tmp_path: Path) -> None:
    lines: list[str] = []
    arguments = ["--quick", "--jobs", "1", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]
    with pytest.raises(_Stop):
        few.main(arguments, _stop_after(3))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "quick").glob("*.json")}
    assert kept

    records = few.main(arguments, lines.append)
    assert f"{len(kept)} of them done before" in "\n".join(lines)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert {r["job"]["variant"] for r in records if "variant" in r["job"]} == set(FEW)
    page = (tmp_path / "docs" / "frontier.md").read_text()
    assert all(f"| {name} |" in page for name in FEW)
    assert sum(line.startswith("**") for line in lines) == 5, "one verdict per claim"
    assert (tmp_path / "docs" / "frontier.png").stat().st_size > 10_000

    again: list[str] = []
    few.main(arguments, again.append)
    assert f"{len(records)} of them done before" in "\n".join(again)
    assert (tmp_path / "docs" / "frontier.md").read_text() == page


class _Stop(Exception):
    pass


def _stop_after(count: int) -> Any:
    seen = itertools.count(1)

    def show(line: str) -> None:
        if next(seen) > count:
            raise _Stop

    return show


def test_budgets_are_met_to_a_step(small: ModuleType) -> None:
    from frontier_budget import config_of
    from frontier_variants import variants
    from stackwise.planning.budget import run_flops, run_tokens

    scale = small.QUICK
    jobs = {(job.variant, job.axis): job for job in small.jobs_of(scale.depth, 1)}
    deep = jobs["end to end", "flops"]
    assert {name for name, _ in jobs} == {v.name for v in variants(4)}
    for variant in variants(4):
        for axis in set(variant.axes) & {axis for _, axis in jobs}:
            if (variant.name, axis) not in jobs:
                continue  # end to end at its own tokens
            job = jobs[variant.name, axis]

            def cost(steps: int, job: Any = job, key: str = variant.steps_key, axis: str = axis) -> float:
                config = config_of({**job.keys, key: steps})
                return run_flops(config, 12) if axis == "flops" else run_tokens(config)

            target = deep.flops * variant.share if axis == "flops" else run_tokens(config_of(deep.keys))
            steps = job.keys[variant.steps_key]
            assert cost(steps) <= target or steps == 1
            assert cost(steps + 1) > target
            assert job.flops == run_flops(config_of(job.keys), 12)


@pytest.mark.parametrize("steps", [10, 30])
def test_the_budget_of_a_thawing_rack_is_what_its_run_costs(small: ModuleType, steps: int) -> None:
    """The boundary rises with the stacks and falls as they thaw. Rows that were stored on the way up are there still,
    but for those that have moved up: in the longer run all of them."""
    from dataclasses import replace

    from frontier_budget import config_of
    from stackwise.curriculum.curricula import stages
    from stackwise.curriculum.specs import first_spec, stage_specs
    from stackwise.planning.budget import leading_blocks

    setting = replace(small.QUICK.depth, steps=steps)
    job = next(job for job in small.jobs_of(setting, 1) if job.variant == "append, gradual")
    config = config_of(job.keys)
    listed = stages(config)
    specs = stage_specs(config, listed, first_spec(config, listed), "fp32")
    boundaries = [leading_blocks(spec, stage) for spec, stage in zip(specs, listed, strict=True)]
    assert boundaries == [0, 1, 2, 3, 3, 2, 1, 0]
    assert sum(stage.steps for stage in listed[:4]) * config.training.batch_size > setting.corpus.rows
    record = small.do(job)
    assert record["flops"] == pytest.approx(job.flops, rel=1e-9)


def test_a_changed_budget_is_another_record(small: ModuleType) -> None:
    from dataclasses import replace

    job = next(iter(small.jobs_of(small.QUICK.depth, 1)))
    other = replace(job, keys={**job.keys, "training.optimizer.lr": 0.5})
    assert other.name != job.name
    assert replace(job, keys=dict(reversed(job.keys.items()))).name == job.name


def test_a_run_that_costs_something_else_is_refused(small: ModuleType) -> None:
    from dataclasses import replace

    job = next(iter(small.jobs_of(small.QUICK.depth, 1)))
    with pytest.raises(RuntimeError, match="GFLOP, and its budget"):
        small.do(replace(job, flops=1.5 * job.flops))


def test_losses_at_equal_seconds_lie_between_runs_and_are_not_made_up() -> None:
    from frontier_report import at_seconds

    runs = [{"cpu_seconds": 10.0, "loss": 3.0}, {"cpu_seconds": 40.0, "loss": 2.0}]
    assert at_seconds(20.0, runs) == pytest.approx(2.5)
    assert at_seconds(42.0, runs) == 2.0
    assert at_seconds(60.0, runs) is None
    assert at_seconds(5.0, runs) is None


def test_a_text_that_is_not_there_is_told(small: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no file input\.txt"):
        small.main(["--quick", "--data", str(tmp_path), "--out", str(tmp_path)], lambda line: None)


def test_the_text_corpus_joins_in(small: ModuleType, tmp_path: Path, text_file: Path) -> None:
    from frontier_scales import settings_of

    setting = settings_of(small.QUICK, text_file)[1]
    base = {**setting.base, "model.vocab_size": len(set(text_file.read_text())), "training.seq_len": 16}
    from dataclasses import replace

    setting = replace(setting, base={**base, "training.batch_size": 2}, steps=2)
    job = next(iter(small.jobs_of(setting, 1)))
    record = small.do(job)
    assert record["accuracy"] is None
    assert math.isfinite(record["loss"])
    assert str(text_file) not in job.name
    assert json.loads(json.dumps(record)) == record
