"""The report: complete, alone, safe, the same every time; and the pictures beside it."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from stackwise.tracking import gallery
from stackwise.tracking.folder import RunFolder, RunFolderError
from stackwise.tracking.report import build_report

EVIL = "<script>alert(1)</script> \x1b[31m & \" ' \u202e </pre>"


class Page(HTMLParser):
    """Collects tags with their attributes and the visible text; notes tags that do not match."""

    void = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.mismatches = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mismatches.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory, make_run, run_events):
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo", run_events(n_stacks=3))
    return folder, build_report(folder.path).read_text("utf-8")


def test_the_pictures_exist_and_are_pngs(built):
    folder, _ = built
    names = {path.name for path in folder.plots.iterdir()}
    assert names == {"loss_tokens.png", "loss_flops.png", "memory.png", "throughput.png"}
    for path in folder.plots.iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_the_page_needs_nothing_outside_itself(built):
    page = Page(built[1])
    assert page.mismatches == []
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//[a-z]|@import|\bfile:", built[1])
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("#"), (tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", built[1]))


def test_references_inside_the_page_are_whole_and_unique(built):
    ids = re.findall(r'\bid="([^"]+)"', built[1])
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', built[1]))
    assert references
    assert references <= set(ids)


def test_the_page_is_for_phones_and_for_both_colour_schemes(built):
    assert 'content="width=device-width, initial-scale=1"' in built[1]
    assert "@media (prefers-color-scheme: dark)" in built[1]
    assert "@media (max-width: 640px)" in built[1]
    drawings = "".join(re.findall(r"<svg.*?</svg>", built[1], re.DOTALL))
    colours = set(re.findall(r"#[0-9a-f]{6}\b", drawings))
    assert colours <= {"#ffffff", "#000000"}, "a colour that would not follow the scheme"
    assert "var(--plot-c0)" in drawings


def test_the_page_holds_the_figures(built, run_events):
    text = " ".join(Page(built[1]).text)
    events = run_events(n_stacks=3)
    for event in events:
        if event["event"] == "eval":
            assert f"{event['loss']:.4f}" in text, event
    for stage in range(len(events[0]["stages"])):
        logged = [e["loss"] for e in events if e["event"] == "step" and e["stage"] == stage]
        assert f"{logged[0]:.4f} → {logged[-1]:.4f}" in text
    before, after = (
        next(event["loss"] for event in events if event.get("when") == when and event["stage"] == 2)
        for when in ("before_growth", "after_growth")
    )
    assert f"{after - before:+.4f}" in text
    assert "d_model: 32" in text
    assert "packages.torch: 2.13.0" in text
    assert "return self.buffer" in text


def test_the_page_says_what_was_stored_of_the_trunk(tmp_path, make_run, run_events):
    page = build_report(make_run(tmp_path / "grown", run_events(n_stacks=3)).path).read_text("utf-8")
    assert (
        "Stored outputs of the frozen trunk. 2 append s1: 1,200 entries, 1.00 MB in memory, 0 B on disk, 2,400 read; "
        "3 append s2: 2,400 entries, 2.00 MB in memory, 0 B on disk, 4,800 read, 1 older store removed.</p>"
    ) in page
    page = build_report(make_run(tmp_path / "alone", run_events(n_stacks=1)).path).read_text("utf-8")
    assert "Stored outputs" not in page


def test_the_same_folder_gives_the_same_page_and_pictures(built, tmp_path):
    folder, page = built
    pictures = {path.name: path.read_bytes() for path in folder.plots.iterdir()}
    assert build_report(folder.path).read_text("utf-8") == page
    assert {path.name: path.read_bytes() for path in folder.plots.iterdir()} == pictures


def test_user_text_is_shown_as_text(tmp_path, make_run, run_events):
    events = run_events(run_id=EVIL, sample=EVIL, n_stacks=2)
    for event in events:
        if "name" in event:
            event["name"] = f"{EVIL} $x$"
    events[0]["stages"] = [{**stage, "trains": [EVIL]} for stage in events[0]["stages"]]
    events.insert(1, {"event": "note", "time": 1.0, "message": EVIL})
    folder = make_run(tmp_path / "x", events, config=f"a: {EVIL}")
    folder.environment.write_text(json.dumps({"os": EVIL}), "utf-8")
    html = build_report(folder.path).read_text("utf-8")
    page = Page(html)
    assert page.mismatches == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert not set(html) & set(EVIL) - set("".join(map(chr, range(32, 127))))
    assert "".join(page.text).count("<script>alert(1)</script> \\x1b[31m") >= 5


def test_an_unfinished_and_an_empty_run_have_a_report(tmp_path, make_run, run_events):
    half = make_run(tmp_path / "half", run_events()[:9])
    assert "not finished" in build_report(half.path).read_text("utf-8")
    empty = make_run(tmp_path / "empty", [])
    assert "No training step has been logged yet" in build_report(empty.path).read_text("utf-8")
    assert not empty.plots.exists()


def test_a_failed_run_shows_why(tmp_path, make_run, run_events):
    events = run_events(stage_steps=20)[:8]
    last = next(event for event in reversed(events) if event["event"] == "step")
    last["loss"] = math.nan
    events.append({"event": "note", "time": 1.0, "message": "the loss is not finite at step 40"})
    end = {**run_events()[-1], "status": "failed", "step": 40, "final_loss": math.nan, "peak_rss_bytes": None}
    html = build_report(make_run(tmp_path / "nan", [*events, end]).path).read_text("utf-8")
    assert '<p class="notice failed">the loss is not finite at step 40</p>' in html


def test_unreadable_lines_are_named_on_the_page(tmp_path, make_run, run_events):
    folder = make_run(tmp_path / "a", run_events(n_stacks=1))
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(b"".join([*lines[:4], b"<b>\n", *lines[5:]])[:-4])
    html = build_report(folder.path).read_text("utf-8")
    assert "metrics.jsonl line 5: not JSON" in html
    assert "The last line of metrics.jsonl was cut off" in html


def test_a_resumed_run_counts_the_last_word(tmp_path, make_run, run_events):
    events = run_events(n_stacks=2)
    cut = next(i for i, event in enumerate(events) if event["event"] == "stage_start" and event["stage"] == 1)
    again = [{**events[0], "start_step": 40}, *events[cut - 1 :]]
    html = build_report(make_run(tmp_path / "a", [*events[:cut], *again]).path).read_text("utf-8")
    assert "resumed once" in html
    assert html.count('<td data-label="Before growth">') == 1


def test_without_matplotlib_the_page_says_how_to_get_the_plots(tmp_path, make_run, run_events, monkeypatch):
    folder = make_run(tmp_path / "a", run_events(n_stacks=1))
    monkeypatch.setattr(gallery, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r'pip install "stackwise\[train\]"'):
        html = build_report(folder.path).read_text("utf-8")
    assert "pip install &quot;stackwise[train]&quot;" in html
    assert "<svg" not in html
    assert not folder.plots.exists()


def test_a_folder_without_a_run_or_metrics_is_named(tmp_path):
    with pytest.raises(RunFolderError):
        build_report(tmp_path)
    RunFolder(tmp_path).write_config("a: 1")
    with pytest.raises(FileNotFoundError):
        build_report(tmp_path)


def test_drawing_leaves_the_settings_of_matplotlib_alone(built):
    import matplotlib

    with matplotlib.rc_context({"font.size": 33, "svg.fonttype": "path"}):
        assert build_report(built[0].path).read_text("utf-8") == built[1]
        assert matplotlib.rcParams["font.size"] == 33


def test_a_run_of_many_stages_folds_up_what_was_stored(tmp_path, make_run, run_events):
    page = build_report(make_run(tmp_path / "long", run_events(n_stacks=17)).path).read_text("utf-8")
    folded = page[page.index("<summary>Stored outputs of the frozen trunk <small>16 stages</small>") :]
    assert folded[: folded.index("</details>")].count("<li>") == 16


def test_a_run_of_one_stage_says_so(tmp_path, make_run, run_events):
    page = build_report(make_run(tmp_path / "one", run_events(n_stacks=1, joint=False)).path).read_text(
        "utf-8"
    )
    assert ">1 stage · " in page
    assert "buffers</text>" not in page, "an item that no stage holds is not in the picture"
    assert "Validation around each growth" not in page
