"""Several runs on one page and in one table: figures over seeds, what differs, and when losses do not compare."""

from __future__ import annotations

import copy
import random
import re

import pytest

from stackwise.tracking.drawing import running_mean
from stackwise.tracking.group_plots import _within_memory
from stackwise.tracking.group_report import GroupPage, build_group_report
from stackwise.tracking.groups import RunGroup, Spread, differences, labelled, warnings_about
from stackwise.tracking.page import ReportedRun
from stackwise.tracking.run_sections import key_figures

CONFIG = "model:\n  d_model: {width}\ntraining:\n  run_id: {name}\n  seed: {seed}\nhub_token: s3cret{seed}\n"


@pytest.fixture
def run(tmp_path, make_run, run_events):
    def make(name, *, width=32, seed=0, shift=0.0, status="done", cut=None, **options):
        events = copy.deepcopy(
            run_events(n_stacks=2, stage_steps=20, log_every=2, run_id=name, status=status, **options)
        )
        for event in events[:cut]:
            for key in ("loss", "loss_last", "eval_loss", "final_loss"):
                if event.get(key) is not None:
                    event[key] += shift
        config = CONFIG.format(width=width, name=name, seed=seed)
        return ReportedRun.read(make_run(tmp_path / name, events[:cut], config).path)

    return make


def test_a_group_has_the_mean_and_the_range_of_its_runs(run):
    shifts = [random.uniform(0, 1) for _ in range(3)]
    group = RunGroup("some", [run(f"r{i}", shift=shift) for i, shift in enumerate(shifts)])
    losses = [one.history.eval_loss for one in group.runs]
    found = group.figures["loss"]
    assert found.mean == pytest.approx(sum(losses) / 3)
    assert (found.low, found.high, found.count) == (min(losses), max(losses), 3)
    assert found.low == pytest.approx(found.high - (max(shifts) - min(shifts)))
    assert group.figures["peak_bytes"].mean == max(
        s.end["bytes"]["peak"] for s in group.runs[0].history.stages
    )


def test_runs_that_are_not_done_do_not_count_beside_those_that_are(run):
    done, stopped = run("a"), run("b", cut=-6, shift=5.0)
    group = RunGroup("both", [done, stopped])
    assert group.status == "1 done, 1 unfinished"
    assert group.figures["loss"].count == 1
    assert RunGroup("alone", [stopped]).figures["loss"].mean == stopped.history.eval_loss
    assert any("both is 1 done, 1 unfinished" in text for text in warnings_about([group]))


def test_settings_that_differ_are_listed_and_places_and_secrets_are_not(run):
    groups = labelled([run("a", width=32, seed=1), run("b", width=48, seed=1), run("c", width=48, seed=2)])
    rows = {row.key: row.values for row in differences(groups)}
    assert rows == {"model.d_model": [32, 48, 48], "training.seed": [1, 1, 2]}
    (row,) = differences(groups[1:])
    assert row.key == "training.seed"


def test_a_key_that_one_run_does_not_have_counts_as_its_default(run):
    one, other = run("a"), run("b")
    other.folder.config.write_text(other.folder.config.read_text() + "evaluation:\n  passes: 7\n")
    (row,) = differences(labelled([one, other]))
    assert (row.key, row.values) == ("evaluation.passes", [4, 7])


def test_other_data_other_tokenizers_and_unreadable_settings_are_said(run):
    one, other = run("a"), run("b")
    assert warnings_about(labelled([one, other])) == []
    one.folder.tokenizer.write_text("{}")
    assert warnings_about(labelled([one, other])) == [], "one of them is not known"
    other.folder.tokenizer.write_text("[]")
    (text,) = warnings_about(labelled([one, other]))
    assert "bits per byte" in text
    other.folder.tokenizer.write_text("{}")
    other.folder.config.write_text("data:\n  path: elsewhere.txt\n" + other.folder.config.read_text())
    (text,) = warnings_about(labelled([one, other]))
    assert "(data.path)" in text
    other.folder.config.write_text("a: [\n")
    assert any("configuration of b cannot be read" in text for text in warnings_about(labelled([one, other])))


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, make_run, run_events):
    runs = [ReportedRun.read(make_run(tmp_path / at / "x", run_events(n_stacks=1)).path) for at in ("p", "q")]
    assert [group.label for group in labelled(runs)] == [str(tmp_path / at / "x") for at in ("p", "q")]


def test_the_page_is_whole_and_holds_figures_curves_and_settings(run, tmp_path):
    evil = "<b>evil</b> $x$"
    groups = [
        RunGroup(evil, [run("a", seed=1), run("b", seed=2, shift=0.3)]),
        RunGroup("other", [run("c", width=48)]),
    ]
    path = build_group_report(
        groups, tmp_path / "page.html", GroupPage("Two", "lead", ["a notice"], ["<h2>More</h2>"])
    )
    html = path.read_text("utf-8")
    assert "<b>evil" not in html
    assert not re.search(r"https?:|<script|@import", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for name in ("compared_flops", "compared_tokens", "compared_seconds", "compared_memory"):
        assert f'id="{name}"' in html
    first, second = (group.figures["loss"] for group in groups)
    assert f"{first.mean:.4f}<small>{first.low:.4f} to {first.high:.4f}</small>" in html
    assert f'<span class="">{second.mean - first.mean:+.4f}</span>' in html.replace(
        ' class="better"', ' class=""'
    )
    assert "a notice" in html
    assert "<h2>More</h2>" in html
    assert "<th>model.d_model</th><td>32</td><td>48</td>" in html
    assert build_group_report(groups, tmp_path / "again.html", GroupPage("Two", "lead", ["a notice"], ["<h2>More</h2>"])
                              ).read_text("utf-8") == html  # fmt: skip


def test_the_loss_within_so_many_bytes_falls_and_the_bytes_rise(run):
    history = run("a").history
    points = list(_within_memory(history).values())
    peaks, lowest = [p for p, _ in points], [loss for _, loss in points]
    assert peaks == sorted(peaks)
    assert lowest == sorted(lowest, reverse=True)
    assert set(peaks) <= {float(s.end["bytes"]["peak"]) for s in history.stages}
    assert peaks[-1] == max(s.end["bytes"]["peak"] for s in history.stages)
    first = history.stages[0]
    assert lowest[0] == first.steps[0]["loss"]
    assert lowest[-1] == min(min(running_mean([e["loss"] for e in s.steps])) for s in history.stages)
    # A smaller stage after a larger one does not make the run smaller, nor does a worse loss raise the curve.
    first.end["bytes"]["peak"] = 10 * max(peaks)
    for event in (event for stage in history.stages[1:] for event in stage.steps):
        event["loss"] += 100
    worst = list(_within_memory(history).values())
    assert set(worst[len(first.steps) - 1 :]) == {(10 * max(peaks), lowest[len(first.steps) - 1])}


def test_a_difference_within_the_ranges_is_not_coloured(run, tmp_path, monkeypatch):
    monkeypatch.setattr("stackwise.tracking.group_report.group_plots", lambda groups: [])

    def page(shift):
        groups = [
            RunGroup("a", [run(f"a{shift}", seed=1), run(f"b{shift}", seed=2, shift=1.0)]),
            RunGroup("b", [run(f"c{shift}", shift=shift)]),
        ]
        html = build_group_report(groups, tmp_path / "page.html", GroupPage("Two")).read_text("utf-8")
        return re.findall(r'<span class="(better|worse|)">[+-]', html)

    assert page(0.4) == [""]
    assert page(-0.2) == ["better"]
    assert page(1.3) == ["worse"]


def test_a_spread_is_its_mean_where_there_is_no_range():
    assert Spread.of([2.0, 2.0]).text(lambda v: f"{v:.1f}") == "2.0"
    assert Spread.of([1.0, 3.0]).text(lambda v: f"{v:.1f}") == "2.0 (1.0 to 3.0)"
    assert Spread.of([]) is None


def test_losses_that_are_bounds_are_called_so_and_not_subtracted_from_exact_ones(run, tmp_path):
    exact, other = run("a"), run("b", shift=0.25)
    for event in other.history.evals:
        event["label"] = "bound"
    groups = labelled([exact, other])
    assert any("not the same measure: exact, bound" in text for text in warnings_about(groups))
    mixed = build_group_report(groups, tmp_path / "both.html", GroupPage("both")).read_text("utf-8")
    assert mixed.count("<small>bound</small>") == 1
    assert "+0.2500" not in mixed
    for event in exact.history.evals:
        event["label"] = "bound"
    assert warnings_about(groups) == []
    bounds = build_group_report(groups, tmp_path / "both.html", GroupPage("both")).read_text("utf-8")
    assert bounds.count("<small>bound</small>") == 2
    assert "+0.2500" in bounds
    assert "(bound)" in key_figures(other)
    assert "(bound)" not in key_figures(run("c"))
