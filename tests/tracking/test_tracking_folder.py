"""Run folders: nothing is overwritten unasked, and a damaged run never hides the others."""

import json
import mmap
import os

import pytest

from stackwise.tracking.environment import environment, peak_rss_bytes, rss_bytes
from stackwise.tracking.folder import RunFolder, RunFolderError, list_runs


def test_a_run_is_not_overwritten_unasked(tmp_path, make_run, run_events):
    folder = make_run(tmp_path / "a", run_events())
    with pytest.raises(
        RunFolderError, match=r"checkpoint\.resume=auto.*checkpoint\.overwrite=true.*training\.run_id"
    ):
        RunFolder.create(folder.path)
    assert folder.metrics.exists()


def test_overwriting_removes_the_run_and_nothing_else(tmp_path, make_run, run_events):
    folder = make_run(tmp_path / "a", run_events())
    (folder.store / "objects").mkdir(parents=True)
    mine = folder.path / "notes.md"
    mine.write_text("mine", "utf-8")
    RunFolder.create(folder.path, overwrite=True)
    assert [path.name for path in folder.path.iterdir()] == ["notes.md"]


def test_a_folder_that_exists_but_holds_no_run_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    assert RunFolder.create(tmp_path / "a").path.is_dir()


def test_a_file_in_the_way_and_folders_without_a_run_are_named(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(RunFolderError, match="is not a folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_files_of_a_run_are_written_whole(tmp_path):
    folder = RunFolder.create(tmp_path / "a")
    folder.write_config("a: 1\n")
    facts = folder.write_environment()
    folder.write_sample("text \ud800")
    assert folder.config.read_text("utf-8") == "a: 1\n"
    assert json.loads(folder.environment.read_text("utf-8")) == facts
    assert folder.sample.read_text("utf-8") == "text \\ud800\n"
    assert not list(folder.path.glob(".*.tmp"))


def test_the_list_holds_the_figures_of_each_run(tmp_path, make_run, run_events):
    events = run_events(run_id="whole")
    make_run(tmp_path / "b", events)
    make_run(
        tmp_path / "a", [{**event, "time": event["time"] + 1e6} for event in run_events(run_id="half")[:13]]
    )
    (tmp_path / "not_a_run").mkdir()
    (tmp_path / ".data").mkdir()
    whole, half = list_runs(tmp_path)
    last_logged = [event for event in events if event["event"] == "step"][-1]
    assert (whole.run_id, whole.status, whole.step, whole.total_steps) == ("whole", "done", 200, 200)
    assert (whole.n_stacks, whole.loss, whole.eval_loss) == (4, last_logged["loss"], events[-2]["loss"])
    assert whole.tokens == events[-1]["tokens"]
    assert whole.seconds == events[-1]["seconds"]
    assert whole.size_bytes == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert (half.status, half.step, half.n_stacks, half.damage) == ("unfinished", 40, 2, None)


def test_damaged_runs_are_listed_as_damaged_with_the_reason(tmp_path, make_run, run_events):
    make_run(tmp_path / "good", run_events())

    cut = make_run(tmp_path / "bad_line", run_events())
    lines = cut.metrics.read_bytes().splitlines(keepends=True)
    cut.metrics.write_bytes(b"".join([*lines[:5], b"garbage\xff\n", *lines[6:]]))

    make_run(tmp_path / "no_metrics", run_events()).metrics.unlink()
    (tmp_path / "no_metrics" / "store").mkdir()
    make_run(tmp_path / "no_config", run_events()).config.unlink()

    directory = make_run(tmp_path / "metrics_is_a_folder", run_events())
    directory.metrics.unlink()
    directory.metrics.mkdir()

    nested = make_run(tmp_path / "nested", run_events())
    nested.metrics.write_text("[" * 100_000 + "\n" + "1\n", "utf-8")

    headless = make_run(tmp_path / "headless", run_events())
    headless.metrics.write_bytes(b"".join(lines[1:]))

    runs = {run.path.name: run for run in list_runs(tmp_path)}
    assert runs["good"].damage is None
    damage = {name: run.damage for name, run in runs.items() if run.status == "damaged"}
    assert set(damage) == set(runs) - {"good"}
    assert damage["bad_line"].startswith("metrics.jsonl line 6: not JSON")
    assert runs["bad_line"].step == 200  # what can be read is still shown
    assert damage["no_metrics"] == "metrics.jsonl is missing"
    assert damage["no_config"] == "config.yaml is missing"
    assert "metrics.jsonl" in damage["metrics_is_a_folder"]
    assert "line 1: not JSON" in damage["nested"]
    assert damage["headless"] == "metrics.jsonl: no run_start event"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_run_is_listed(tmp_path, make_run, run_events):
    folder = make_run(tmp_path / "locked", run_events())
    folder.path.chmod(0)
    try:
        (run,) = list_runs(tmp_path)
    finally:
        folder.path.chmod(0o700)
    assert run.status == "damaged"
    assert "locked" in run.damage


def test_a_torn_last_line_is_no_damage(tmp_path, make_run, run_events):
    folder = make_run(tmp_path / "a", run_events())
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:-9])
    (run,) = list_runs(tmp_path)
    assert (run.status, run.damage) == ("unfinished", None)


def test_a_missing_directory_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_runs(tmp_path / "nowhere")


def test_the_environment_is_json_and_names_the_torch_that_is_installed():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["cpus"] >= 1


@pytest.mark.skipif(os.name == "nt", reason="no getrusage")
def test_resident_memory_grows_with_what_is_held():
    before = rss_bytes()
    block = mmap.mmap(-1, 24 << 20)  # fresh pages, whatever the C library has kept of freed memory
    block.write(b"x" * len(block))
    assert rss_bytes() - before > len(block) // 2
    assert peak_rss_bytes() >= rss_bytes() * 0.9


def test_without_proc_the_peak_stands_in(monkeypatch):
    def no_proc(path, *args, **kwargs):
        raise FileNotFoundError(str(path))

    monkeypatch.setattr("pathlib.Path.read_text", no_proc)
    before = peak_rss_bytes()
    assert before <= rss_bytes() <= peak_rss_bytes()


def test_remove_takes_the_run_and_leaves_the_rest(tmp_path):
    run = RunFolder.create(tmp_path / "runs" / "a")
    run.write_config("training: {}\n")
    run.remove()
    assert not run.path.exists(), "nothing else was in it"
    run = RunFolder.create(tmp_path / "runs" / "a")
    run.write_config("training: {}\n")
    (run.path / "notes.txt").write_text("mine")
    run.remove()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]
