"""Forks, exported commits and the way back: the same state bit for bit, whole or not at all."""

import contextlib
import errno
import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stackwise import ConfigError, StackWiseConfig, train
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.store import Store
from stackwise.checkpoint.upkeep import examine
from stackwise.storage import ops
from stackwise.storage.errors import DamagedFileError, UnsafeInputError
from stackwise.tracking.folder import RunFolder, RunFolderError
from stackwise.tracking.metrics import read_metrics
from stackwise.training.copies import export_commit, fork, import_commit
from stackwise.training.errors import IncompatibleResumeError
from stackwise.training.stored import open_run


@pytest.fixture
def run(tiny, monkeypatch):
    """A finished run of two stages and a joint one, of three steps each, saved every two."""
    monkeypatch.setattr(ops, "fsync", lambda fd: None)
    short = {"model__architecture__n_stacks": 2, "training__max_steps": 3, "checkpoint__save_interval": 2}
    config = tiny(checkpoint__keep_last=50, **short)
    return RunFolder(train(config, sinks=[])["run_dir"])


def store_of(folder):
    return Store(folder.store)


def contents(commit):
    return {name: part.sha256 for name, part in commit.parts.items()}


def losses(folder):
    return [(e["step"], e["loss"]) for e in read_metrics(folder.metrics).events if e["event"] == "step"]


def resume(folder, **options):
    return train(StackWiseConfig.from_yaml(folder.config), sinks=[], **options)


@pytest.mark.parametrize("name", ["step:2", "stage-01", "stage-02"])
def test_a_fork_ends_as_the_run_it_came_from(run, tmp_path, name):
    store = store_of(run)
    made = fork(run, store.find(name), tmp_path / "elsewhere" / "twin")
    (commit,) = store_of(made).commits()
    assert contents(commit) == contents(store.find(name))
    assert (commit.parent, commit.pin) == (store.find(name).sha256, "forked")
    assert StackWiseConfig.from_yaml(made.config).training.run_id == "twin"
    assert losses(made) == [row for row in losses(run) if row[0] <= commit.step]
    assert resume(made)["resumed_from"] == commit.id
    assert contents(store_of(made).latest()) == contents(store.latest())
    assert losses(made) == losses(run)
    assert examine(store_of(made)).damage == examine(store).damage == ()


def test_a_fork_costs_no_second_copy_where_files_can_have_two_names(run, tmp_path, monkeypatch):
    commit = store_of(run).latest()
    made = fork(run, commit, tmp_path / "linked")
    paths = [
        store.objects.path(p.sha256)
        for p in commit.parts.values()
        for store in (store_of(run), store_of(made))
    ]
    assert all(a.stat().st_ino == b.stat().st_ino for a, b in zip(paths[::2], paths[1::2], strict=True))
    # a run that is removed takes nothing from the other
    run.remove()
    assert examine(store_of(made)).whole == (store_of(made).latest().id,)

    def other_disk(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(ops, "link", other_disk)
    copied = fork(made, store_of(made).latest(), tmp_path / "copied")
    assert contents(store_of(copied).latest()) == contents(commit)
    path = store_of(copied).objects.path(next(iter(commit.parts.values())).sha256)
    assert path.stat().st_nlink == 1


def test_a_fork_goes_on_with_other_settings_and_says_so(run, tmp_path):
    commit = store_of(run).find("stage-02")
    made = fork(run, commit, tmp_path / "hotter", ["training.optimizer.lr=1e-2", "tracking.log_interval=2"])
    result = resume(made)
    newest = store_of(made).latest()
    assert result["resumed_from"] is not None
    assert contents(newest) != contents(store_of(run).latest())
    meta = store_of(made).meta(newest)
    assert meta["config"]["training.optimizer.lr"] == 1e-2
    assert [change["key"] for change in meta["progress"]["changes"]] == ["training.optimizer.lr"]
    # other changes still need leave
    config = StackWiseConfig.from_yaml(made.config)
    config.training.optimizer.lr = 5e-2
    with pytest.raises(IncompatibleResumeError, match="--allow-change"):
        train(config, sinks=[])
    # and a fork of the fork knows what it was made with, before it is trained
    waiting = fork(run, commit, tmp_path / "waiting", ["training.optimizer.lr=1e-2"])
    twice = fork(waiting, store_of(waiting).latest(), tmp_path / "twice", ["training.max_grad_norm=0.5"])
    resume(twice)
    meta = store_of(twice).meta(store_of(twice).latest())
    assert {change["key"] for change in meta["progress"]["changes"]} == {
        "training.optimizer.lr",
        "training.max_grad_norm",
    }


@pytest.mark.parametrize("override", ["model.d_model=32", "training.seed=7", "data.tokenizer=byte"])
def test_a_fork_cannot_be_of_another_model_or_text(run, tmp_path, override):
    with pytest.raises(ConfigError, match=r"checkpoint\.init_from"):
        fork(run, store_of(run).latest(), tmp_path / "other", [override])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("what", ["fork", "export", "import"])
def test_nothing_is_written_over(run, tmp_path, what):
    commit = store_of(run).latest()
    export_commit(run, commit, tmp_path / "out")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    work = {
        "fork": lambda: fork(run, commit, taken),
        "export": lambda: export_commit(run, commit, taken),
        "import": lambda: import_commit(tmp_path / "out", taken),
    }
    with pytest.raises(RunFolderError, match="exists already"):
        work[what]()
    assert [path.name for path in taken.iterdir()] == ["mine"]


# Out and in again


def test_an_exported_commit_comes_back_bit_for_bit_and_goes_on_as_if_nothing_had_been(run, tmp_path):
    store = store_of(run)
    commit = store.find("step:4")
    export_commit(run, commit, tmp_path / "out")
    made, again = import_commit(tmp_path / "out", tmp_path / "back" / "again")
    assert again == commit.__class__(**{**vars(commit), "path": again.path})
    assert again.path.read_bytes() == commit.path.read_bytes()
    assert contents(again) == contents(commit)
    assert losses(made) == [row for row in losses(run) if row[0] <= 4]
    resume(made)
    assert contents(store_of(made).latest()) == contents(store.latest())
    assert losses(made) == losses(run)


def test_an_exported_commit_is_plain_files_that_other_programs_read(run, tmp_path):
    store = store_of(run)
    commit = store.latest()
    export_commit(run, commit, tmp_path / "out")
    for name in commit.parts:
        loaded = load_file(tmp_path / "out" / f"{name.replace(':', '.').replace('/', '.')}.safetensors")
        stored = store.load(commit, name)
        assert loaded.keys() == stored.keys()
        assert all(loaded[key].equal(stored[key]) for key in stored)
    listed = {line.split("  ")[1] for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()}
    assert listed | {"SHA256SUMS"} == {path.name for path in (tmp_path / "out").iterdir()}


def export(run, tmp_path):
    folder = tmp_path / "out"
    export_commit(run, store_of(run).latest(), folder)
    return folder


def refused(folder, target, *kinds):
    with pytest.raises(kinds) as caught:
        import_commit(folder, target)
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}*"))
    return caught.value


def test_every_damaged_or_missing_file_is_found(run, tmp_path):
    whole = export(run, tmp_path)
    rng = random.Random(3)
    for path in sorted(whole.iterdir()):
        for how in rng.sample(("flip", "cut", "gone", "link"), 2):
            folder = tmp_path / "hurt"
            shutil.copytree(whole, folder)
            victim, content = folder / path.name, path.read_bytes()
            at = rng.randrange(len(content))
            victim.unlink()
            if how == "flip":
                victim.write_bytes(
                    content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
                )
            elif how == "cut":
                victim.write_bytes(content[:at])
            elif how == "link":
                victim.symlink_to(path)
            if (
                path.name == "SHA256SUMS"
            ):  # the rest is whole, and checks itself but for configuration and log
                with contextlib.suppress(CheckpointError, DamagedFileError, UnsafeInputError):
                    _, again = import_commit(folder, tmp_path / f"list-{how}")
                    assert again.sha256 == store_of(run).latest().sha256
            else:
                error = refused(folder, tmp_path / "new", CheckpointError, DamagedFileError, UnsafeInputError)
                assert path.name in str(error) or "manifest" in str(error), (path.name, how, str(error))
            shutil.rmtree(folder)
    import_commit(whole, tmp_path / "new")


def rewritten(folder, change):
    """The export with another manifest, under the name that its content demands."""
    import hashlib

    (old,) = folder.glob("?????????-*.json")
    record = json.loads(old.read_text())
    change(record)
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    old.unlink()
    name = f"{old.name[:9]}-{hashlib.sha256(text).hexdigest()[:16]}.json"
    (folder / name).write_bytes(text)
    (folder / "SHA256SUMS").unlink()


def test_a_manifest_that_lies_is_refused(run, tmp_path):
    def swap(record):
        a, b = [item for item in record["objects"] if item["part"] in ("stack:s0/weights", "norm/weights")]
        a["part"], b["part"] = b["part"], a["part"]

    def outside(record):
        record["objects"][0]["part"] = "../../etc/passwd"

    def wider(record):
        record["meta"]["rack"]["vocab_size"] += 1

    def other_tokenizer(record):
        record["meta"]["tokenizer"] = "0" * 64

    for change in (swap, outside, wider, other_tokenizer):
        folder = export(run, tmp_path)
        rewritten(folder, change)
        refused(folder, tmp_path / "new", CheckpointError, ValueError)
        shutil.rmtree(folder)


def test_a_folder_that_is_no_export_says_what_is(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "ckpt export" in str(refused(tmp_path / "empty", tmp_path / "new", CheckpointError))


def test_damage_stops_a_fork_and_an_export(run, tmp_path):
    commit = store_of(run).latest()
    path = store_of(run).objects.path(commit.parts["stack:s1/weights"].sha256)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for work in (fork, export_commit):
        with pytest.raises(CheckpointError, match="stack:s1/weights"):
            work(run, commit, tmp_path / "new")
        assert not (tmp_path / "new").exists()


POINTS = ["export.partial", "manifest.synced", "folder.filled"]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_no_half_of_a_folder(run, tmp_path, child, killed, monkeypatch, point):
    commit = store_of(run).latest()
    export_commit(run, commit, tmp_path / "out")
    works = {
        "fork": lambda: fork(run, commit, tmp_path / "fork"),
        "export": lambda: export_commit(run, commit, tmp_path / "export"),
        "import": lambda: import_commit(tmp_path / "out", tmp_path / "import"),
    }
    for name, work in works.items():
        code = child(work, crash_at=point)
        assert code in (killed, 0)
        assert (tmp_path / name).exists() == (code == 0)
        if code == killed:
            work()
    assert examine(store_of(run)).damage == ()
    assert {path.name for path in Path(tmp_path / "export").iterdir()} == {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_a_commit_is_opened_by_any_of_its_names(run):
    store = store_of(run)
    for name in ("stage-01", "step:2", store.commits()[0].id[:14]):
        opened = open_run(run.path, commit=name)
        assert opened.commit == store.find(name)
        assert len(opened.rack.stacks) == len(opened.meta["rack"]["stacks"])
