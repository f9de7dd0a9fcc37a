"""The benchmark of depth diagnostics: its runs are those of the other benchmarks, whole run folders, made once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from stackwise.objectives.denoiser import denoiser_of
from stackwise.tracking.metrics import read_metrics
from stackwise.training.stored import open_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 100


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import depth_diagnostics

    quick = depth_diagnostics.QUICK
    corpus = replace(quick.depth.corpus, rows=64, held_out=16)
    short = replace(quick, depth=replace(quick.depth, corpus=corpus, steps=8))
    monkeypatch.setattr(depth_diagnostics, "QUICK", short)
    monkeypatch.setattr(depth_diagnostics, "QUICK_STEPS", 20)
    monkeypatch.setattr(depth_diagnostics, "ROWS", ["append, cached"])
    monkeypatch.setattr(depth_diagnostics, "TIMES", ["independent"])
    return depth_diagnostics


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "input.txt").write_text(TEXT)
    folders = {"--out": "out", "--runs": "runs", "--docs": "docs"}
    return [
        "--quick",
        "--data",
        str(tmp_path),
        *(w for k, v in folders.items() for w in (k, str(tmp_path / v))),
    ]


def test_the_runs_are_run_folders_with_diagnostics_and_a_report(
    program: ModuleType, words: list[str], tmp_path: Path
) -> None:
    said: list[str] = []
    program.main(words, said.append)
    records = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    assert set(records) == {"frontier-append_cached-s1", "time-independent-s1"}
    for name, record in records.items():
        opened = open_run(tmp_path / "runs" / name)
        assert record["depth"]["commit"] == opened.commit.id
        log = read_metrics(opened.folder.metrics)
        counted = [event["tokens"] for event in log.events if event["event"] == "step"]
        assert counted == sorted(counted)
        assert log.events[-1]["flops"] == pytest.approx(record["flops"])
        page = opened.folder.report.read_text()
        assert "What each stack is good for" in page
        assert '<p class="notice">' not in page
        assert str(tmp_path) not in json.dumps(record)
    (view,) = records["frontier-append_cached-s1"]["depth"]["views"]
    assert len(view["stacks"]) == 8
    assert view["loss"] == pytest.approx(records["frontier-append_cached-s1"]["loss"], abs=2e-3)
    text = (tmp_path / "docs" / "depth-diagnostics.md").read_text()
    assert "| append, cached |" in text
    assert "another stack answers" in text
    assert (tmp_path / "docs" / "depth-diagnostics.png").stat().st_size > 10_000
    again: list[str] = []
    program.main(words, again.append)
    assert again == said[2:]  # nothing is run a second time


def test_the_assembled_rack_answers_as_the_stacks_alone(
    program: ModuleType, words: list[str], tmp_path: Path
) -> None:
    dat = program.dat
    text = tmp_path / "input.txt"
    job = next(j for j in dat.jobs_of(dat.FULL, text) if (j.variant, j.stacks) == ("independent", 3))
    job = replace(job, steps=20)
    corpus = dat.corpus_of(job.text)
    denoisers, owners, _ = dat.train_row(job, corpus, dat.Meter())
    config, rack = program.assembled(job, denoisers)
    whole = denoiser_of(rack, config, corpus.tokenizer.special_ids)
    alone = dat.score(denoisers, owners, corpus)["nelbo"]
    assert dat.score([whole], [0] * dat.LENGTH, corpus)["nelbo"] == pytest.approx(alone, rel=1e-6)


def test_a_row_that_is_not_there_is_named(program: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"--only grow: no such row; there are append, cached"):
        program.main([*words, "--only", "grow"])
    with pytest.raises(SystemExit, match=r"there is no file input\.txt"):
        program.main(["--data", "/nowhere"])
