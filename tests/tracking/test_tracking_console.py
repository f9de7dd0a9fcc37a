"""What the terminal shows: plain lines in a pipe, a live display that fits any width, nothing a model can inject."""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from stackwise.tracking import units
from stackwise.tracking.console import ConsoleProgress
from stackwise.tracking.display import Display, sparkline
from stackwise.tracking.events import FIELDS
from stackwise.tracking.progress import Progress


def show(events, *, width=100, terminal=False):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, highlight=False, legacy_windows=False)
    sink = ConsoleProgress(console)
    for event in events:
        sink.emit(event)
    sink.close()
    return file.getvalue()


def test_every_kind_of_event_is_shown():
    sink = ConsoleProgress(Console(file=io.StringIO()))
    assert [kind for kind in FIELDS if not callable(getattr(sink, f"_on_{kind}", None))] == []


def test_the_load_of_experts_is_a_line_of_its_own():
    event = {"event": "experts", "step": 3, "stage": 0, "max_load": 1.5, "min_load": 0.25, "loss": 0.0123}
    assert show([event]) == "  experts busiest 1.50, idlest 0.25 times the mean  balancing 0.0123\n"
    assert show([event], terminal=True) == ""


def test_outside_a_terminal_there_is_one_plain_line_per_log(run_events):
    events = run_events(n_stacks=2, stage_steps=20)
    text = show(events, width=40)
    assert "\x1b" not in text
    assert "\r" not in text
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(steps) == sum(event["event"] == "step" for event in events)
    assert re.fullmatch(
        r"step 10/60  stage 1/3  loss \d\.\d{4}  lr \d\.\d\de-\d\d  grad \d\.\d\d  [\d.]+ k tok/s"
        r"  memory \d+ MB  left \d:\d\d",
        steps[0],
    )


def test_a_growth_shows_validation_before_and_after(run_events):
    events = run_events(n_stacks=2, stage_steps=20)
    before, after = (
        next(event["loss"] for event in events if event.get("when") == when)
        for when in ("before_growth", "after_growth")
    )
    line = next(line for line in show(events).splitlines() if "grew" in line)
    assert f"before {before:.4f}" in line
    assert f"after {after:.4f}" in line
    assert f"({after - before:+.4f})" in line


def test_a_stage_ends_with_the_losses_that_its_lines_have_shown(run_events):
    events = run_events(n_stacks=2, stage_steps=20)
    lines = [line for line in show(events).splitlines() if "training loss" in line]
    for stage, line in enumerate(lines):
        logged = [event["loss"] for event in events if event["event"] == "step" and event["stage"] == stage]
        assert f"training loss {logged[0]:.4f} → {logged[-1]:.4f}" in line
    assert len(lines) == len(events[0]["stages"])


def test_a_growth_that_keeps_the_function_is_called_unchanged(run_events):
    events = run_events(n_stacks=2, stage_steps=20)
    before = next(event for event in events if event.get("when") == "before_growth")
    events = [
        {**event, "loss": before["loss"]} if event.get("when") == "after_growth" else event
        for event in events
    ]
    assert "(unchanged)" in show(events)


def test_samples_checkpoints_notes_and_the_end_have_their_lines(run_events):
    events = run_events(n_stacks=1, stage_steps=20, joint=False)
    text = show([*events[:-1], {"event": "note", "time": 1.0, "message": "slow disk"}, events[-1]])
    assert "  │ def read(self, size=-1):\n  │     return self.buffer\n" in text
    assert "saved step 20  5.16 MB written  0.04 s" in text
    assert "note slow disk" in text
    assert text.splitlines()[-1].startswith("done  20 steps · final loss ")


def test_a_stage_that_stored_outputs_of_its_trunk_has_a_line_about_them(run_events):
    lines = [line for line in show(run_events(n_stacks=3)).splitlines() if "stored outputs" in line]
    assert lines == [
        "  stored outputs  1,200 entries · 1.00 MB in memory · 0 B on disk · 2,400 read",
        "  stored outputs  2,400 entries · 2.00 MB in memory · 0 B on disk · 4,800 read · 1 older store removed",
    ]


def test_text_of_a_model_cannot_drive_the_terminal(run_events):
    events = run_events(
        n_stacks=1, stage_steps=20, run_id="\x1b]0;x\x07", sample="[bold red]\x1b[2J\x9b\r\u202e" * 3
    )
    text = show(events, width=400)
    assert not set("\x1b\x9b\r\x07\u202e") & set(text)
    assert "[bold red]\\x1b[2J\\x9b\\x0d\\u202e" in text
    live = show(events, width=400, terminal=True)
    assert "\x1b[2J" not in live
    assert "\x1b]0;" not in live


@pytest.mark.parametrize("width", [40, 46, 60, 72, 80, 100, 160])
@pytest.mark.parametrize("blocks", [2, 40])
def test_the_live_display_fits_the_terminal(run_events, width, blocks):
    progress = Progress()
    console = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    for event in run_events(n_stacks=4, stage_steps=20, blocks_per_stack=blocks):
        progress.update(event)
        if event["event"] in ("run_start", "stage_start", "step"):
            lines = [
                "".join(segment.text for segment in line)
                for line in console.render_lines(Display(progress), console.options, pad=False)
            ]
            assert len(lines) == 7  # a blank line, the frame, four rows
            assert max(map(len, lines)) <= width
            assert all(line.startswith(("╭", "│", "╰")) for line in lines[1:])


def test_the_live_display_names_stage_step_loss_speed_memory_and_time_left(run_events):
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    for event in run_events(n_stacks=4, stage_steps=20):
        now[0] += 5.0
        progress.update(event)
        if event.get("when") == "after_growth":
            break
    console = Console(file=io.StringIO(), width=120, force_terminal=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(Display(progress))
    text = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    assert "stage 2/5 append s1" in text
    assert "2 of 5 blocks frozen" in text
    assert re.search(r"stage .* 0/20", text)
    assert re.search(r"run .* 20%\s+20/100", text)
    assert re.search(r"loss\s+\d\.\d{4}", text)
    assert "tok/s" in text
    assert "MB memory" in text
    assert "elapsed" in text


def test_time_left_follows_the_measured_pace_and_the_cost_of_later_stages(run_events):
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    events = run_events(n_stacks=2, stage_steps=20, log_every=5)
    start = events[0]
    stages = [
        {**start["stages"][0], "steps": 20, "params": 100, "trainable_params": 100},  # cost 600
        {**start["stages"][1], "steps": 10, "params": 100, "trainable_params": 25},  # cost 300: half
    ]
    progress.update({**start, "stages": stages, "total_steps": 30})
    progress.update(events[1])
    assert progress.seconds_left is None
    for event in events[2:4]:  # steps 5 and 10, two seconds each
        now[0] += 10.0
        progress.update({**event, "seconds": now[0]})
    assert progress.stage_seconds_left == pytest.approx(20.0)
    assert progress.seconds_left == pytest.approx(30.0)
    now[0] += 4.0
    assert progress.seconds_left == pytest.approx(26.0)


def test_the_first_step_of_a_stage_does_not_count_into_the_pace(run_events):
    """It counts bytes and warms up."""
    progress = Progress(clock=lambda: 0.0)
    events = run_events(n_stacks=1, stage_steps=40, joint=False)
    step = next(event for event in events if event["event"] == "step")
    for event in events[:2]:
        progress.update(event)
    for at, seconds in ((1, 9.0), (10, 18.0), (20, 28.0)):
        progress.update({**step, "step": at, "stage_step": at, "seconds": seconds})
    assert progress.stage_seconds_left == pytest.approx(20.0)


@pytest.mark.parametrize("width", [50, 80, 140])
def test_both_bars_end_at_one_column_however_long_the_rest_takes(run_events, width):
    clock = [0.0]
    progress = Progress(clock=lambda: clock[0])
    for event in run_events(n_stacks=2, stage_steps=20_000, log_every=500, blocks_per_stack=40)[:60]:
        clock[0] = event["time"]
        progress.update(event)
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(Display(progress))
    stage, run = (line for line in console.file.getvalue().splitlines() if "%" in line)
    assert " h left" in run
    assert re.search("[━─] +[0-9]+%", stage).start() == re.search("[━─] +[0-9]+%", run).start()


def test_a_long_name_stays_behind_its_label_and_a_growth_on_one_line(run_events):
    name = "a-name-of-many-words-" * 5
    events = run_events(n_stacks=2, stage_steps=20, run_id=name)
    quiet = [event for event in events if event["event"] != "stage_start"]  # which would begin to draw
    for width in (50, 80):
        lines = re.sub(r"\x1b\[[0-9;]*m", "", show(quiet, width=width, terminal=True)).splitlines()
        assert f"run {name}" in lines
        (grown,) = [line for line in lines if "grew" in line]
        assert re.search(r"\d\.\d{4} → (after )?\d\.\d{4}  \([+-]\d\.\d{4}\)$", grown)
        assert ("before" in grown) == (width == 80)


def test_what_is_wider_than_the_terminal_goes_on_below_indented():
    message = " ".join(["word"] * 40)
    lines = re.sub(
        r"\x1b\[[0-9;]*m", "", show([{"event": "note", "message": message}], width=50, terminal=True)
    )
    first, *rest = lines.splitlines()
    assert first.startswith("note word")
    assert rest
    assert all(line.startswith("    word") for line in rest)
    assert max(map(len, lines.splitlines())) <= 50
    assert " ".join(lines.split()) == f"note {message}"
    assert show([{"event": "note", "message": message}], width=50) == f"note {message}\n"


def test_a_resumed_run_starts_in_the_middle(run_events):
    events = run_events(n_stacks=2, stage_steps=20)
    progress = Progress()
    progress.update({**events[0], "start_step": 25})
    progress.update(
        next(event for event in events if event["event"] == "stage_start" and event["stage"] == 1)
    )
    assert (progress.stage, progress.stage_step) == (1, 5)
    assert "resumed after step 25" in show([{**events[0], "start_step": 25}])


def test_a_sparkline_falls_with_its_values():
    assert sparkline([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert sparkline([1.0] * 50, 8) == "▁" * 8
    assert len(sparkline([float(i) for i in range(500)], 24)) == 24
    assert sparkline([float("nan")], 8) == ""


def test_an_ascii_terminal_gets_ascii(run_events):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=80, force_terminal=True, legacy_windows=False)
    sink = ConsoleProgress(console)
    for event in run_events(n_stacks=2, stage_steps=20, sample="naïve → text"):
        sink.emit({**event, "rss_bytes": None} if event["event"] == "step" else event)
    sink.close()
    file.flush()
    written = file.buffer.getvalue()
    assert b"grew  validation before" in written
    assert rb"na\xefve \u2192 text" in written


def test_numbers_read_well():
    assert [units.count(n) for n in (0, 7, 999, 1000, 999_600, 1_234_567, 0.5)] == [
        "0", "7", "999", "1.00 k", "1.00 M", "1.23 M", "0.50",
    ]  # fmt: skip
    assert (units.size(612_000_000), units.flops(3.4e12), units.size(None)) == ("612 MB", "3.40 TFLOP", "–")
    assert [units.duration(s) for s in (0.4, 7, 754, 11_109, 190_000)] == [
        "0:00",
        "0:07",
        "12:34",
        "3:05:09",
        "2 d 4 h",
    ]
    assert [units.remaining(s) for s in (None, 7, 754, 3599, 11_109, 190_000)] == [
        "–",
        "0:07",
        "12:34",
        "59:59",
        "3:05 h",
        "2 d 4 h",
    ]
    assert [units.tick(n) for n in (0, 500, 1500, 2e6)] == ["0", "500", "1.5 k", "2 M"]


def test_tracking_imports_neither_torch_nor_rich_nor_matplotlib():
    code = (
        "import sys\n"
        "from stackwise.tracking import console, environment, events, folder, metrics, plots, report\n"
        "environment.environment()\n"
        "print([name for name in ('torch', 'rich', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
