"""The depth-as-time benchmark: budgets are met, every row runs, the page is written, and a second call runs nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 100


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import depth_as_time

    kinds = [v for v in depth_as_time.VARIANTS if not v.once or v.name == "independent, cold"]
    monkeypatch.setattr(depth_as_time, "VARIANTS", kinds)
    (tmp_path / "input.txt").write_text(TEXT)
    scale = depth_as_time.Scale("few", seeds=(1,), steps=40, stacks=(2,), middle=2, width=16)
    options = argparse.Namespace(
        data=tmp_path, out=tmp_path / "out", jobs=1, report_only=False, docs=tmp_path / "docs"
    )
    return depth_as_time, scale, options


def test_every_row_runs_for_the_same_cost_and_a_second_call_runs_nothing(few):
    program, scale, options = few
    said: list[str] = []
    records = program.go(scale, options, said.append)
    assert {record["job"]["variant"] for record in records} == {variant.name for variant in program.VARIANTS}
    costs = [record["flops"] for record in records]
    assert max(costs) < 1.05 * min(costs)
    page = (options.docs / "depth-as-time.md").read_text()
    assert "### 2 stacks" in page
    assert str(options.data) not in page
    assert (options.docs / "depth-as-time.png").stat().st_size > 10_000
    again: list[str] = []
    assert program.go(scale, options, again.append) == records
    assert again[0].startswith(f"{len(records)} runs, {len(records)} of them done before")


def test_the_score_is_that_of_the_evaluation_room(few):
    program, _, options = few
    from stackwise.evaluation.nelbo import nelbo

    corpus = program.corpus_of(str(options.data / "input.txt"))
    job = program.Job("end to end", 1, 1, 30, 16, str(options.data / "input.txt"), "")
    denoiser = program.train_whole(
        job, 1, 30 * program.cost_of_step(job, 1, ("all",), None, corpus), corpus, program.Meter()
    )
    ours = program.score([denoiser], [0] * program.LENGTH, corpus)
    theirs = nelbo(denoiser, corpus.validation, seq_len=program.LENGTH, passes=64)
    spread = torch.tensor(ours["by_pass"]).std()
    assert ours["nelbo"] == pytest.approx(theirs.nats_per_token, abs=float(4 * spread) + 0.02)


def test_a_folder_without_text_is_refused(few, tmp_path):
    program, scale, options = few
    options.data = tmp_path / "nothing"
    with pytest.raises(SystemExit, match=r"no file input\.txt"):
        program.go(scale, options, print)
