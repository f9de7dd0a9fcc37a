"""Trackers hold what metrics.jsonl holds, each step once, and no failure of theirs ends a run."""

from __future__ import annotations

import csv
import json
import os
import random
import sqlite3
from pathlib import Path

import pytest

from stackwise import ConfigError, StackWiseConfig
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import last_step, read_metrics
from stackwise.tracking.settings import TrackingSettings
from stackwise.tracking.sinks import choose, wandb
from stackwise.tracking.sinks.append_only import AppendOnly
from stackwise.tracking.sinks.base import Guarded
from stackwise.tracking.sinks.csv_file import COLUMNS, CsvFile
from stackwise.tracking.sinks.rows import Rows
from stackwise.training.loop import Engine
from stackwise.training.run import train


@pytest.fixture(autouse=True)
def _at_home(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def losses_in_csv(folder: RunFolder) -> list[tuple[int, float]]:
    with open(folder.csv, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["event"] == "step"]
    return [(int(row["step"]), float(row["loss"])) for row in rows]


def losses_in_tensorboard(folder: RunFolder) -> list[tuple[int, float]]:
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    board = module.EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")]


def losses_in_trackio(folder: RunFolder) -> list[tuple[int, float]]:
    (path,) = folder.trackio.glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    found = [(step, json.loads(metrics).get("train/loss")) for step, metrics in rows]
    return [(step, loss) for step, loss in found if loss is not None]


def wandb_records(content: bytes) -> list[bytes]:
    """Records of a .wandb file: a header of 7 bytes, then those of a LevelDB log in blocks of 32 KiB."""
    records, at, parts = [], 7, b""
    while at + 7 <= len(content):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(parts)
            parts = b""
    return records


def losses_in_wandb(folder: RunFolder) -> list[tuple[int, float]]:
    from wandb import teardown
    from wandb.proto.wandb_internal_pb2 import Record

    teardown()  # its own process writes; a run of the command line ends with this
    found = []
    for path in sorted(folder.wandb.glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            history = Record.FromString(data).history
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in history.item}
            if "train/loss" in row:
                found.append((int(row["_step"]), float(row["train/loss"])))
    return found


READERS = {
    "csv": losses_in_csv,
    "tensorboard": losses_in_tensorboard,
    "trackio": losses_in_trackio,
    "wandb": losses_in_wandb,
}


@pytest.fixture(params=READERS)
def tracker(request):
    if request.param in choose.LIBRARIES:
        package, extra = choose.LIBRARIES[request.param]
        pytest.importorskip(package, reason=f"{package} is not installed (extra {extra})")
    return request.param


def config(folder: Path, *sinks: str, **tracking) -> StackWiseConfig:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 40)
    return StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 16,
                "n_heads": 2,
                "max_seq_len": 16,
                "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
            },
            "training": {
                "run_id": "tiny",
                "batch_size": 2,
                "seq_len": 16,
                "max_steps": 5,
                "dtype": "float32",
            },
            "data": {"source": "text", "path": str(folder / "text.txt"), "tokenizer": "char"},
            "evaluation": {"batches": 1},
            "checkpoint": {"dir": str(folder / "runs"), "save_interval": 3},
            "generation": {"max_new_tokens": 2},
            "tracking": {"log_interval": 1, "report": False, "sinks": list(sinks), **tracking},
        }
    )


class Bomb:
    """Ends the run once it has seen a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def emit(self, event) -> None:
        if event["event"] == "step" and event["step"] == self.step:
            raise RuntimeError("the machine went away")

    def close(self) -> None:
        pass


def steps_of(folder: RunFolder) -> list[tuple[int, float]]:
    events = read_metrics(folder.metrics).events
    return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    return [step for step, _ in found] == [step for step, _ in expected] and all(
        a == pytest.approx(b, rel=1e-6) for (_, a), (_, b) in zip(found, expected, strict=True)
    )


def test_a_run_hands_its_figures_to_the_trackers_it_names(tmp_path, tracker):
    """It also dies in its midst and goes on: no step is there twice, and none is missing."""
    chosen = config(tmp_path, tracker)
    with pytest.raises(RuntimeError, match="went away"):
        train(chosen, sinks=[Bomb(random.choice([8, 9]))])
    folder = RunFolder(train(chosen, sinks=[])["run_dir"])
    expected = steps_of(folder)
    assert [step for step, _ in expected] == list(range(1, 13))
    assert same(READERS[tracker](folder), expected)
    folder.remove()
    assert not folder.path.exists(), "nothing of a tracker is left behind"


def test_a_run_that_goes_back_takes_csv_and_tensorboard_along(tmp_path, monkeypatch):
    original = Engine._loss

    def spiked(self, *args):
        at = self.loader.state_dict()["cursor"] // self.loader.batch_size
        return original(self, *args) * (50.0 if at == 11 else 1.0)

    monkeypatch.setattr(Engine, "_loss", spiked)
    chosen = config(tmp_path, "csv", "tensorboard")
    chosen.model.architecture.n_stacks = 1
    chosen.training.max_steps, chosen.checkpoint.save_interval = 14, 2
    chosen.training.spike_policy, chosen.training.spike_window = "rollback", 4
    chosen.training.spike_sigma, chosen.training.rollback_steps = 8.0, 5
    folder = RunFolder(train(chosen, sinks=[])["run_dir"])
    notes = [event["message"] for event in read_metrics(folder.metrics).events if event["event"] == "note"]
    assert any("Went back to the commit of step 6" in note for note in notes)
    expected = steps_of(folder)
    assert [step for step, _ in expected] == list(range(1, 15))
    assert same(losses_in_csv(folder), expected)
    assert same(losses_in_tensorboard(folder), expected)


def test_a_tracker_that_keeps_everything_is_handed_each_step_once(run_events):
    events = [e for e in run_events(n_stacks=1, stage_steps=60, joint=False) if e["event"] == "step"]

    class Kept(AppendOnly):
        def __init__(self):
            super().__init__()
            self.steps = []

        def hand_over(self, row):
            self.steps.append(row.step)

    sink = Kept()
    sink.replay(events[:2], -1)
    for event in events[2:4]:
        sink.emit(event)
    sink.rewind(events[:1])
    for event in events[1:]:
        sink.emit(event)
    assert sink.steps == [10, 20, 30, 40, 50, 60]
    later = Kept()
    later.replay(events[:5], 30)
    later.emit(events[5])
    assert later.steps == [40, 50, 60]


def test_the_project_is_where_trackers_file_the_run(tmp_path):
    settings = TrackingSettings(sinks=["trackio", "wandb"], project="mine")
    for name in settings.sinks:
        assert choose._tracker(name, settings, RunFolder(tmp_path), "tiny").project == "mine"
    pytest.importorskip("trackio", reason="trackio is not installed (extra track)")
    chosen = config(tmp_path, "trackio", project="mine")
    folder = RunFolder(train(chosen, sinks=[])["run_dir"])
    assert [path.name for path in folder.trackio.glob("*.db")] == ["mine.db"]


def test_a_second_run_of_the_process_has_a_database_of_its_own(tmp_path, run_events):
    pytest.importorskip("trackio", reason="trackio is not installed (extra track)")
    events = run_events(n_stacks=1, stage_steps=20, joint=False)
    for name in ("one", "two"):
        folder = RunFolder.create(tmp_path / name)
        sink = choose._tracker("trackio", TrackingSettings(), folder, name)
        sink.open(events, {"a": 1})
        sink.close()
        assert len(losses_in_trackio(folder)) == 2
    assert "TRACKIO_DIR" not in os.environ


def test_trackio_sends_nothing_anywhere(tmp_path, run_events, monkeypatch, capsys):
    pytest.importorskip("trackio", reason="trackio is not installed (extra track)")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/somewhere")
    folder = RunFolder.create(tmp_path / "run")
    sink = choose._tracker("trackio", TrackingSettings(), folder, "run")
    sink.open(run_events(n_stacks=1, stage_steps=20, joint=False), {})
    sink.close()
    assert len(losses_in_trackio(folder)) == 2
    assert os.environ["TRACKIO_SPACE_ID"] == "somebody/somewhere"
    assert capsys.readouterr().out == "", "what --quiet prints is the run folder alone"


def test_wandb_is_offline_unless_somebody_is_logged_in(tmp_path, monkeypatch):
    assert wandb.mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb.mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password secret\n")
    assert wandb.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb.mode() == "online"


def test_a_resumed_wandb_run_keeps_its_id(tmp_path):
    names = ("run-20260102_030405-bbb", "offline-run-20260101_030405-aaa", "offline-run-20260103_030405-ccc")
    assert wandb._id_in(tmp_path) is None
    for name in names:
        (tmp_path / name).mkdir()
    assert wandb._id_in(tmp_path) == "ccc"


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "track"), ("trackio", "track"), ("wandb", "wandb")]
)
def test_a_missing_library_is_named_before_anything_is_written(tmp_path, monkeypatch, name, extra):
    monkeypatch.setattr(choose, "find_spec", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        train(config(tmp_path, "csv", name), sinks=[])
    assert f"tracking.sinks: {name} needs the package {name}" in str(caught.value)
    assert f'pip install "stackwise[{extra}]"' in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", [["csv", "csv"], ["tensorbord"], "csv"])
def test_wrong_trackers_are_refused(value):
    with pytest.raises(ConfigError, match=r"sinks.*allowed: list of csv, tensorboard, trackio, wandb"):
        TrackingSettings(sinks=value)


class Broken(CsvFile):
    """A tracker that fails at one step and would work again later."""

    def __init__(self, path, fails_at):
        super().__init__(path)
        self.fails_at, self.asked = fails_at, []

    def emit(self, event):
        if event["event"] == "step":
            self.asked.append(event["step"])
            if event["step"] == self.fails_at:
                raise OSError("no room\nmore of it")
        super().emit(event)


def test_a_tracker_that_fails_is_said_once_and_at_the_end_and_the_run_goes_on(tmp_path, monkeypatch):
    made = []

    def broken(name, settings, folder, run_id):
        made.append(Broken(folder.csv, 4))
        return made[-1]

    monkeypatch.setattr(choose, "_tracker", broken)
    result = train(config(tmp_path, "csv"), sinks=[])
    events = read_metrics(RunFolder(result["run_dir"]).metrics).events
    said = [event["message"] for event in events if event["event"] == "note" and "csv" in event["message"]]
    assert said == [
        "tracking.sinks: csv failed and is left out from here on: OSError: no room",
        "tracking.sinks: csv has not seen the whole run: it failed (OSError: no room). metrics.jsonl has it all",
    ]
    assert made[0].asked == [1, 2, 3, 4]
    assert events[-1]["status"] == "done"
    assert events[-2]["message"] == said[1]


def test_a_tracker_that_cannot_be_opened_ends_a_new_run_and_no_resumed_one(tmp_path):
    said: list[str] = []
    for must in (True, False):
        guarded = Guarded(CsvFile(tmp_path / "no" / "such" / "folder.csv"), said.append)
        if must:
            with pytest.raises(FileNotFoundError):
                guarded.open([], {}, must=True)
        else:
            guarded.open([], {}, must=False)
    assert len(said) == 1
    assert said[0].startswith("tracking.sinks: csv could not be taken up again and is left out")


def test_secrets_are_kept_from_trackers(tmp_path, monkeypatch):
    seen = []

    class Spy(CsvFile):
        def open(self, events, config):
            seen.append(config)
            super().open(events, config)

    monkeypatch.setattr(choose, "_tracker", lambda name, settings, folder, run_id: Spy(folder.csv))
    folder = RunFolder.create(tmp_path / "run")
    folder.metrics.write_text("")
    trackers = choose.Trackers(TrackingSettings(sinks=["csv"]), folder, "run", print)
    trackers.open(folder, {"hub": {"token": "hf_abc", "name": "x"}}, resumed=False)
    assert seen == [{"hub": {"token": "(hidden)", "name": "x"}}]


def test_rows_know_where_the_run_stands_and_what_a_growth_changed(run_events):
    events = run_events(n_stacks=2, stage_steps=20)
    rows, found = Rows(), []
    for event in events:
        if (row := rows.of(event)) is not None:
            found.append((event, row))
    for event, row in found:
        if event["event"] in ("step", "eval"):
            assert (row.step, row.tokens, row.flops) == (event["step"], event["tokens"], event["flops"])
    kinds = {event["event"] for event, _ in found}
    assert kinds == {"step", "eval", "experts", "checkpoint", "stage_start", "stage_end", "sample", "run_end"}
    before, after = (
        next(e["loss"] for e in events if e.get("when") == when) for when in ("before_growth", "after_growth")
    )
    (change,) = [row.scalars["growth/change"] for _, row in found if "growth/change" in row.scalars]
    assert change == pytest.approx(after - before)
    assert all(isinstance(value, float) for _, row in found for value in row.scalars.values())
    assert [row.step for _, row in found] == sorted(row.step for _, row in found)


def test_curves_are_drawn_over_steps_tokens_and_flops(tmp_path, run_events):
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    events = run_events(n_stacks=2, stage_steps=20)
    folder = RunFolder.create(tmp_path / "run")
    sink = choose._tracker("tensorboard", TrackingSettings(), folder, "run")
    sink.open(events[:10], {"model": {"d_model": 3}})
    sink.rewind(events)
    sink.close()
    board = module.EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0})
    board.Reload()
    steps = [event for event in events if event["event"] == "step"]
    for tag, axis in (
        ("train/loss", [event["step"] for event in steps]),
        ("train/loss by tokens", [event["tokens"] for event in steps]),
        ("train/loss by GFLOP", [int(event["flops"] // 1e9) for event in steps]),
    ):
        assert [event.step for event in board.Scalars(tag)] == axis
    assert {"sample/text_summary", "stage/text_summary", "config/text_summary"} <= set(
        board.Tags()["tensors"]
    )
    assert b"    model:" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_the_table_has_a_line_per_step_and_evaluation(tmp_path, run_events):
    events = run_events(n_stacks=1, stage_steps=20, joint=False)
    events[3] = {**events[3], "loss": float("nan")} if "loss" in events[3] else events[3]
    sink = CsvFile(tmp_path / "metrics.csv")
    sink.open(events[:4], {})
    for event in events[4:]:
        sink.emit(event)
    sink.close()
    with open(sink.path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    wanted = [event for event in events if event["event"] in ("step", "eval")]
    assert [row["event"] for row in rows] == [event["event"] for event in wanted]
    for row, event in zip(rows, wanted, strict=True):
        assert float(row["loss"]) == pytest.approx(event["loss"], nan_ok=True)
        assert row["when"] == event.get("when", "")


def test_the_last_step_of_a_log_is_what_was_announced(tmp_path, make_run, run_events):
    assert last_step(tmp_path / "none.jsonl") == -1
    folder = make_run(tmp_path / "run", run_events(n_stacks=1, stage_steps=20, joint=False))
    with open(folder.metrics, "a") as file:
        file.write('{"event":"step","st')
    assert last_step(folder.metrics) == 20
