"""metrics.jsonl: exact cuts, torn lines, one rising step, numbers that JSON does not know."""

import json
import math
import random

import pytest

from stackwise.tracking.metrics import MetricsError, MetricsFile, read_metrics


def write(folder, events):
    sink = MetricsFile(folder)
    for event in events:
        sink.emit(event)
    sink.close()
    return sink.path


@pytest.fixture
def events(run_events):
    return run_events(n_stacks=2, stage_steps=20, log_every=2)


def test_what_is_written_is_read_back(tmp_path, events):
    path = write(tmp_path, events)
    assert read_metrics(tmp_path).events == read_metrics(path).events == events
    assert len(path.read_text("utf-8").splitlines()) == len(events)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 19, 20, 21, 37, 40, 60, 99])
def test_a_cut_and_repeated_run_equals_the_uninterrupted_one_byte_for_byte(tmp_path, events, step):
    whole = write(tmp_path, events).read_bytes()
    sink = MetricsFile(tmp_path)
    dropped = sink.cut_after(step)
    kept = read_metrics(tmp_path).events
    assert kept == events[: len(events) - dropped]
    assert all(event.get("step", 0) <= step for event in kept)
    rest = events[len(kept) :]
    assert not rest or rest[0]["step"] > step
    for event in rest:
        sink.emit(event)
    sink.close()
    assert sink.path.read_bytes() == whole


def test_a_cut_at_a_size_goes_back_to_that_very_point(tmp_path, events):
    sink = MetricsFile(tmp_path)
    sizes = []
    for event in events:
        sizes.append(sink.size())
        sink.emit(event)
    whole = sink.path.read_bytes()
    assert sink.size() == len(whole)
    for at in (len(events) - 1, 7, 3, 0):
        sink.cut_at(sizes[at])
        assert read_metrics(tmp_path).events == events[:at]
        assert sink.size() == sizes[at]
    for event in events:
        sink.emit(event)
    assert sink.path.read_bytes() == whole
    sink.cut_at(sizes[5] + 3)  # inside a line: the rest of it goes too
    assert sink.path.read_bytes() == whole[: sizes[5]]
    sink.cut_at(10**9)
    sink.close()
    assert sink.path.read_bytes() == whole[: sizes[5]]


def test_an_event_without_a_step_goes_with_the_one_before_it(tmp_path, events):
    note = {"event": "note", "time": 1.0, "message": "slow disk"}
    at = next(i for i, event in enumerate(events) if event.get("step") == 6) + 1
    write(tmp_path, [*events[:at], note, *events[at:]])
    sink = MetricsFile(tmp_path)
    sink.cut_after(6)
    assert read_metrics(tmp_path).events[-1] == note
    sink.cut_after(5)
    sink.close()
    assert note not in read_metrics(tmp_path).events


@pytest.mark.parametrize(
    "tail", [b'{"event":"note","ti', b"\0\0\0\0", b"\0" * 40 + b"\n", b'{"event":"note"}\n']
)
def test_a_torn_last_line_is_left_out_and_then_dropped(tmp_path, events, tail):
    path = write(tmp_path, events)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    log = read_metrics(path)
    assert log.torn
    assert log.events == events
    MetricsFile(tmp_path).close()
    assert path.read_bytes() == whole


def test_every_truncation_of_the_file_can_be_read_and_continued(tmp_path, events):
    events = events[:6]
    path = write(tmp_path, events)
    whole = path.read_bytes()
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        kept = read_metrics(path).events
        assert kept == events[: len(kept)]
        write(tmp_path, events[len(kept) :])
        assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named_not_skipped(tmp_path, events):
    path = write(tmp_path, events)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:-20] + b"\n"
    path.write_bytes(b"".join(lines))
    for use in (read_metrics, lambda path: MetricsFile(path.parent)):
        with pytest.raises(MetricsError, match=r"metrics\.jsonl line 4: not JSON\. .*delete line 4"):
            use(path)
    log = read_metrics(path, strict=False)
    assert log.events == events[:3] + events[4:]
    assert log.problems == log.listed_problems == ["metrics.jsonl line 4: not JSON"]


def test_many_damaged_lines_are_counted_not_listed(tmp_path, events):
    path = write(tmp_path, events)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = random.randint(5, len(lines) - 2)
    path.write_bytes(b"".join([b"\xff\x00no event\n"] * damaged + lines[damaged:]))
    for use in (read_metrics, lambda path: MetricsFile(path.parent)):
        with pytest.raises(
            MetricsError, match=rf"line 1: not JSON\. {damaged - 1} more of its {len(lines)} lines"
        ):
            use(path)
    log = read_metrics(path, strict=False)
    assert len(log.problems) == damaged
    assert log.listed_problems == [*log.problems[:3], f"metrics.jsonl: {damaged - 3} more such lines"]


def test_a_missing_file_names_what_is_left_of_the_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is missing.*stackwise ckpt ls"):
        read_metrics(tmp_path)


def test_steps_that_fall_back_are_refused(tmp_path, events):
    path = write(tmp_path, events)
    before = path.read_bytes()
    sink = MetricsFile(tmp_path)
    step = next(event for event in events if event["event"] == "step")
    with pytest.raises(MetricsError, match=r"of step 2 after one of step 60.*cut_after"):
        sink.emit(step)
    sink.close()
    assert path.read_bytes() == before


def test_the_same_step_is_logged_once(tmp_path, run_events):
    events = run_events(n_stacks=1, stage_steps=4, log_every=2)
    step = next(event for event in events if event["event"] == "step")
    sink = MetricsFile(tmp_path)
    sink.emit(step)
    with pytest.raises(MetricsError):
        sink.emit(step)
    sink.cut_after(0)
    sink.emit(step)
    sink.close()


def test_numbers_that_are_not_finite_make_valid_json_and_come_back(tmp_path, run_events):
    end = {**run_events()[-1], "final_loss": math.nan, "seconds": math.inf, "flops": -math.inf}
    path = write(tmp_path, [end])
    raw = json.loads(path.read_text("utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (raw["final_loss"], raw["seconds"], raw["flops"]) == ("NaN", "Infinity", "-Infinity")
    back = read_metrics(path).events[0]
    assert math.isnan(back["final_loss"])
    assert (back["seconds"], back["flops"]) == (math.inf, -math.inf)


def test_any_text_is_one_line(tmp_path):
    text = "naïve\r\n\u2028 \x1b[31m \0 \ud800 end"
    event = {"event": "sample", "time": 1.0, "step": 1, "stage": 0, "prompt": "", "text": text}
    path = write(tmp_path, [event])
    assert path.read_bytes().count(b"\n") == 1
    assert read_metrics(path).events[0]["text"] == text


def test_no_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "gone"])
def test_a_log_that_is_not_the_one_of_the_commit_is_set_aside_and_told(tmp_path, events, damage):
    sink = MetricsFile(tmp_path)
    for event in events[:8]:
        sink.emit(event)
    kept = sink.fingerprint()
    for event in events[8:]:
        sink.emit(event)
    sink.close()
    whole = sink.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    if damage == "flip":
        lines[4] = lines[4].replace(b"1700000000", b"1700000001")
    elif damage == "cut":
        lines = lines[:3]
    elif damage == "zeros":
        lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    changed = b"".join(lines) if damage != "gone" else b""
    sink.path.unlink() if damage == "gone" else sink.path.write_bytes(changed)
    found = MetricsFile(tmp_path, kept)
    assert str(sink.path) in found.problem
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == changed[: kept["metrics_bytes"]]
    left = read_metrics(tmp_path).events
    expected = {"flip": 8, "cut": 3, "zeros": 7, "gone": 0}[damage]
    assert len(left) == expected
    assert MetricsFile(tmp_path, found.fingerprint()).problem is None


def test_what_was_logged_after_the_commit_is_dropped_unread(tmp_path, events):
    sink = MetricsFile(tmp_path)
    for event in events[:8]:
        sink.emit(event)
    kept = sink.fingerprint()
    sink.close()
    with open(sink.path, "ab") as file:
        file.write(b"\0" * 30 + b"\n" + sink.path.read_bytes()[:200])
    found = MetricsFile(tmp_path, kept)
    assert found.problem is None
    assert read_metrics(tmp_path).events == events[:8]
    assert found.fingerprint() == kept
