"""The report's section on depth: drawings that say what the figures say, safe, and of the last commit alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from stackwise.tracking.depth_drawings import WIDTH, bars, curve, heat_map
from stackwise.tracking.depth_section import depth
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.page import ReportedRun
from stackwise.tracking.report import build_report

Run = tuple[RunFolder, str]


def square(count: int) -> list[list[float | None]]:
    cells = [[random.random() for _ in range(count)] for _ in range(count)]
    return [[1.0 if i == j else round(v, 3) for j, v in enumerate(row)] for i, row in enumerate(cells)]


def record_of(commit: str, stacks: int = 3, owner: int | None = None, uid: str = "s") -> dict[str, Any]:
    listed = [
        {
            "position": i,
            "uid": f"{uid}{i}",
            "format": "nf4" if i == 0 else "fp32",
            "exit": random.uniform(2, 3),
            "removed": random.uniform(-1, 1) if owner in (None, i) else None,
            "gradient": None if i == 0 else random.random(),
            "signal": random.random(),
            "stream": random.random(),
            "update": random.random(),
        }
        for i in range(stacks)
    ]
    names = [stack["uid"] for stack in listed]
    points = names if owner is not None else ["embedding", *names]
    view = {
        "name": "all rows" if owner is None else "0 to 0.5 hidden",
        "noise": None if owner is None else [0, 0.5],
        "alone": owner is not None,
        "owner": owner,
        "loss": 2.1234,
        "entry": 3.4,
        "stacks": listed,
        "points": points,
        "cka": square(len(points)),
    }
    protocol = {"windows": 64, "seq_len": 128, "unit": "nats per token", "label": "exact"}
    return {"commit": commit, "step": 120, "protocol": protocol, "views": [view]}


@pytest.fixture
def run(tmp_path: Path, make_run: Callable[..., RunFolder], run_events: Callable[..., Any]) -> Run:
    events = run_events(n_stacks=3)
    commit = next(event["commit"] for event in reversed(events) if event["event"] == "checkpoint")
    return make_run(tmp_path / "run", events), commit


def section(folder: RunFolder, record: object) -> str:
    folder.depth.write_text(record if isinstance(record, str) else json.dumps(record))
    return depth(ReportedRun.read(folder.path))


def drawings(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_a_run_without_the_file_has_no_section(run: Run) -> None:
    folder, _ = run
    assert depth(ReportedRun.read(folder.path)) == ""
    assert "What each stack is good for" not in build_report(folder.path).read_text()


def test_the_section_holds_all_figures_and_stands_in_the_report(run: Run) -> None:
    folder, commit = run
    record = record_of(commit)
    html = section(folder, record)
    assert len(drawings(html)) == 6
    for stack in record["views"][0]["stacks"]:
        assert f"{stack['removed']:+.4f}" in html
        assert f"{stack['exit']:.4f}" in html
        for name in ("signal", "stream", "update"):
            assert f">{stack[name]:.3g}<" in html
    assert "64 held-out windows of 128 tokens at step 120" in html
    assert "<small>nf4</small>" in html
    assert html in build_report(folder.path).read_text()


def test_stacks_that_answer_alone_are_held_against_the_owner(run: Run) -> None:
    folder, commit = run
    record = record_of(commit, owner=1)
    html = section(folder, record)
    assert "0 to 0.5 hidden, answered by s1 alone: loss 2.1234" in html
    assert "Loss with another stack in its place" in html
    assert len(drawings(html)) == 2


@pytest.mark.parametrize("change", ["commit", "half", "keys", "type", "twice"])
def test_figures_that_do_not_belong_to_the_run_are_a_notice(run: Run, change: str) -> None:
    folder, commit = run
    record: Any = record_of(commit)
    if change == "commit":
        record["commit"] = "000000001-00"
    elif change == "keys":
        del record["views"][0]["stacks"][1]["update"]
    elif change == "type":
        record["views"] = 7
    text = json.dumps(record)
    text = {"half": text[: len(text) // 2], "twice": '{"commit": 1, "commit": 2}'}.get(change, text)
    html = section(folder, text)
    assert html.count('<p class="notice">') == 1
    said = "the run has gone on since" if change == "commit" else "depth.json cannot be read"
    assert said in html
    assert "stackwise eval RUN --depth" in html
    assert not drawings(html)


def test_names_are_shown_as_text(run: Run) -> None:
    folder, commit = run
    html = section(folder, record_of(commit, uid="<b>\x1b&"))
    assert "<b>" not in html
    assert "\x1b" not in html
    assert len(drawings(html)) == 6


# --- drawings ------------------------------------------------------------------------------------------------------


def rects(svg: str) -> list[dict[str, str]]:
    return [dict(e.attrib) for e in ElementTree.fromstring(svg).iter("rect")]


def test_bars_are_as_long_as_their_figures_on_their_side_of_zero() -> None:
    values = [random.uniform(0.2, 1), None, -random.uniform(0.2, 1), random.uniform(0.2, 1)]
    first, below, last = rects(bars("b", ["a", "b", "c", "d"], values))
    heights = [float(r["height"]) for r in (first, below, last)]
    scale = heights[0] / values[0]
    assert heights == pytest.approx([abs(v) * scale for v in values if v is not None], abs=0.2)
    zero = float(first["y"]) + heights[0]
    assert float(below["y"]) == pytest.approx(zero, abs=0.2)
    assert below["fill"] != first["fill"] == last["fill"]


def test_a_curve_passes_through_its_points_and_its_level_is_the_loss() -> None:
    svg = curve("c", ["in", "s0", "s1"], [3.0, 2.5, 2.0], 2.0)
    circles = [dict(e.attrib) for e in ElementTree.fromstring(svg).iter("circle")]
    ys = [float(c["cy"]) for c in circles]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)
    assert f"{ys[2]:.1f} H" in svg


def test_cells_are_as_full_as_their_figures() -> None:
    cells = rects(heat_map("h", ["a", "b"], [[1.0, 0.25], [None, 1.0]]))
    assert [float(c["fill-opacity"]) for c in cells] == pytest.approx([1, 0.28, 0.04, 1], abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 9, 24, 64, 200])
def test_any_number_of_stacks_fits(count: int) -> None:
    names = [f"s{i}" for i in range(count)]
    values = [random.gauss(0, 1) * 10 ** random.randint(-9, 4) for _ in names]
    for svg in (
        bars("b", names, values),
        curve("c", names, values, 0.1),
        heat_map("h", names, square(count)),
        bars("b", names, [None] * count),
        bars("b", names, [0.0] * count),
    ):
        root = ElementTree.fromstring(svg)
        for element in root.iter():
            for key in ("x", "cx"):
                assert 0 <= float(element.attrib.get(key, 0)) <= WIDTH
        marks = [e.text or "" for e in root.iter("text") if e.attrib["text-anchor"] == "end"]
        assert all(len(mark) <= 8 for mark in marks)
        labels = [
            float(e.attrib["x"])
            for e in root.iter("text")
            if e.attrib["text-anchor"] == "middle" and e.text in names
        ]
        assert all(b - a > 14 for a, b in pairwise(labels))
        assert not re.search(r"#[0-9a-f]{3,6}", svg)
        assert "nan" not in svg
