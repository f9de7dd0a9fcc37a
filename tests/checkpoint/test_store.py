"""Commits: what goes in comes out, only changes are written, damage is always noticed."""

import hashlib
import json
import os
import shlex

import pytest
import torch

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import CheckpointError, VersionError
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.cli.main import main


def object_path(store, commit, part):
    sha256 = commit.parts[part].sha256
    return store.root / "objects" / sha256[:2] / sha256


def overwrite(path, content):
    path.chmod(0o644)
    path.write_bytes(content)


def flip(path, at=-1, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    overwrite(path, bytes(content))


def run_command_of(error):
    """Run the command in the last line of a message."""
    program, *words = shlex.split(str(error).splitlines()[-1])
    assert (program, main(words)) == ("stackwise", 0)


def stored_files(store):
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


def test_a_state_comes_back_whole(store, make_state, assert_whole):
    commit = store.commit(make_state(3), {"step": 3}, step=3, pin="stage-00")
    assert (commit.step, commit.number, commit.pin, commit.parent) == (3, 1, "stage-00", None)
    assert_whole(Store(store.root), 3, make_state(3))
    part = commit.parts["embedding/weights"]
    assert [(t.name, t.dtype, t.shape) for t in part.tensors] == [("weight", "F32", (6, 4))]
    assert (store.root / "refs" / "latest").read_text().strip() == commit.id
    assert Store(store.root).commits() == [commit]


def test_meta_comes_back_exactly(store):
    meta = {
        "loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "zero": -0.0,
        "big": 2**70,
        "text": "ü\n\udc80",
        "none": None,
        "l": [True],
    }
    commit = store.commit({}, meta, step=0)
    back = store.meta(commit)
    assert back == meta
    assert str(back["zero"]) == "-0.0"


@pytest.mark.parametrize(
    ("meta", "where"),
    [
        ({"a": {"b": [1, float("nan")]}}, r"meta\.a\.b\[1\]"),
        ({"a": {1: 2}}, r"meta\.a"),
        ({"rng": torch.zeros(2)}, r"meta\.rng"),
        ({"s": {1, 2}}, r"meta\.s"),
    ],
)
def test_meta_that_json_would_change_is_refused_with_its_place(store, meta, where):
    with pytest.raises(ValueError, match=where):
        store.commit({}, meta, step=0)
    assert store.latest() is None


def test_only_changed_parts_are_written(store, make_state):
    first = store.commit(make_state(1), {"step": 1}, step=1)
    assert first.bytes_written == first.bytes_total == sum(part.bytes for part in first.parts.values())
    second = store.commit(make_state(2), {"step": 2}, step=2)
    changed = ("stack:s0/weights", "stack:s0/optimizer")
    assert second.bytes_written == sum(second.parts[name].bytes for name in changed)
    assert second.parts["embedding/weights"] == first.parts["embedding/weights"]
    assert second.parent == first.sha256
    third = store.commit(make_state(2), {"step": 3}, step=3)
    assert third.bytes_written == 0
    assert len(list((store.root / "objects").rglob("*/*"))) == 5


def test_equal_parts_share_one_object(store):
    commit = store.commit({"stack:a": {"w": torch.ones(4)}, "stack:b": {"w": torch.ones(4)}}, {}, step=0)
    assert commit.bytes_written == commit.bytes_total == commit.parts["stack:a"].bytes


def test_a_carried_part_is_listed_again_without_being_written(store, make_state):
    first = store.commit({"stack:s0/weights": {"w": torch.ones(64)}}, {}, step=1)
    carried = {"stack:s0/full": (first, "stack:s0/weights")}
    second = store.commit({"stack:s0/weights": {"w": torch.zeros(2)}}, {}, step=2, carried=carried)
    store.prune(Retention(1))
    assert second.bytes_written < 300
    assert torch.equal(store.load(second, "stack:s0/full")["w"], torch.ones(64))
    with pytest.raises(ValueError, match="both given and carried"):
        store.commit({"a": {"w": torch.ones(1)}}, {}, step=3, carried={"a": (second, "stack:s0/full")})
    object_path(store, second, "stack:s0/full").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        store.commit({}, {}, step=3, carried={"x": (second, "stack:s0/full")})


def test_equal_histories_give_equal_bytes(tmp_path, make_state):
    stores = [Store(tmp_path / name) for name in "ab"]
    for store in stores:
        for step in (1, 2):
            store.commit(
                dict(reversed(make_state(step).items())) if store is stores[0] else make_state(step),
                {"a": 1, "b": 2},
                step=step,
            )
    assert stored_files(stores[0]) == stored_files(stores[1])
    assert [c.sha256 for c in stores[0].commits()] == [c.sha256 for c in stores[1].commits()]


def test_hashing_beside_writing_changes_no_byte_and_passes_errors_on(tmp_path, make_state, monkeypatch):
    plain = Store(tmp_path / "plain").commit(make_state(1), {}, step=1)
    monkeypatch.setattr("stackwise.checkpoint.store._WORTH_A_THREAD", 0)
    store = Store(tmp_path / "threaded")
    assert store.commit(make_state(1), {}, step=1).id == plain.id
    assert store.commit({}, {}, step=2).parts == {}
    with pytest.raises(CheckpointError, match="frozen"):
        store.commit(make_state(3), {}, step=3, frozen={"embedding/weights": "0" * 64})
    assert store.latest().step == 2


def test_tied_tensors_must_be_given_once(store):
    weight = torch.ones(3)
    with pytest.raises(ValueError, match="embedding: w and head: w are the same memory"):
        store.commit({"embedding": {"w": weight}, "head": {"w": weight}}, {}, step=0)


@pytest.mark.parametrize(
    "arguments", [{"step": -1}, {"step": 10**9}, {"step": 1.0}, {"step": 1, "pin": "a/../b"}]
)
def test_impossible_steps_and_pins_are_refused(store, arguments):
    with pytest.raises(ValueError):
        store.commit({}, {}, **arguments)
    assert not store.root.exists()


def test_order_follows_the_commits_not_the_steps_nor_the_clock(store, make_state):
    for step in (10, 20, 30):
        store.commit(make_state(step), {"step": step}, step=step)
    older = store.commits()[1]
    back = store.commit(make_state(25), {"step": 25}, step=25, parent=older)
    for number, commit in enumerate(store.commits()):
        os.utime(commit.path, (10**9 - number, 10**9 - number))
    assert [commit.step for commit in store.commits()] == [10, 20, 30, 25]
    assert store.latest() == back
    assert back.parent == older.sha256


def test_a_store_that_is_only_read_is_not_created(store):
    assert store.commits() == []
    assert store.latest() is None
    assert not store.root.exists()


# Damage


def test_any_flipped_bit_of_an_object_is_found_before_tensors_are_handed_out(store):
    commit = store.commit({"stack:s0/weights": {"w": torch.arange(3.0)}}, {}, step=1)
    path = object_path(store, commit, "stack:s0/weights")
    content = path.read_bytes()
    for at in range(len(content)):
        flip(path, at, 1 << at % 8)
        with pytest.raises(CheckpointError, match="SHA-256"):
            store.load(commit, "stack:s0/weights")
        overwrite(path, content)
    store.load(commit, "stack:s0/weights")


def test_any_truncation_or_extension_of_an_object_is_found(store):
    commit = store.commit({"p": {"w": torch.arange(3.0)}}, {}, step=1)
    path = object_path(store, commit, "p")
    content = path.read_bytes()
    for other in [content[:length] for length in range(len(content))] + [content + b"\0"]:
        overwrite(path, other)
        with pytest.raises(CheckpointError, match="bytes, expected"):
            store.load(commit, "p")
        with pytest.raises(CheckpointError, match="bytes, expected"):
            store.latest()


def test_any_flipped_bit_or_truncation_of_a_manifest_is_found(store):
    commit = store.commit({"p": {"w": torch.zeros(1)}}, {}, step=1)
    content = commit.path.read_bytes()
    for at in range(len(content)):
        flip(commit.path, at, 1 << at % 8)
        with pytest.raises(CheckpointError):
            store.latest()
        overwrite(commit.path, content[:at])
        with pytest.raises(CheckpointError):
            store.meta(commit)
        overwrite(commit.path, content)
    assert store.latest() == commit


def test_swapped_objects_are_found(store, make_state):
    state = {"a": {"w": torch.zeros(4)}, "b": {"w": torch.ones(4)}}
    commit = store.commit(state, {}, step=1)
    a, b = object_path(store, commit, "a"), object_path(store, commit, "b")
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    overwrite(a, b_bytes)
    overwrite(b, a_bytes)
    for part in state:
        with pytest.raises(CheckpointError, match=f"part '{part}'"):
            store.load(commit, part)


@pytest.mark.parametrize("how", ["missing", "link", "pipe"])
def test_an_object_that_is_no_file_is_missing(store, tmp_path, how):
    commit = store.commit({"p": {"w": torch.zeros(1)}}, {}, step=1)
    path = object_path(store, commit, "p")
    path.rename(tmp_path / "moved")
    if how == "link":
        path.symlink_to(tmp_path / "moved")
    if how == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is missing"):
        store.latest()
    with pytest.raises(CheckpointError, match="is missing"):
        store.load(commit, "p")


def test_the_error_names_part_file_what_is_intact_and_a_command_that_works(store, make_state, assert_whole):
    for step in (1, 2, 3):
        state = make_state(min(step, 2))  # commits 2 and 3 share all objects
        store.commit(state, {"step": step}, step=step)
    first, second, third = store.commits()
    path = object_path(store, third, "stack:s0/weights")
    flip(path)
    reader = Store(store.root)
    with pytest.raises(CheckpointError) as caught:
        reader.load(third, "stack:s0/weights")
    error = caught.value
    assert (error.exit_code, error.path, error.part) == (3, path, "stack:s0/weights")
    for text in ("stack:s0/weights", str(path), third.id, second.id, f"Not hurt: {first.id} (step 1)"):
        assert text in str(error)
    run_command_of(error)
    assert_whole(reader, 1, make_state(1))


def test_a_damaged_newest_manifest_is_never_passed_over(store, make_state, assert_whole):
    first = store.commit(make_state(1), {"step": 1}, step=1)
    second = store.commit(make_state(2), {"step": 2}, step=2)
    flip(second.path, 20)
    with pytest.raises(CheckpointError, match=f"Not hurt: {first.id}") as caught:
        store.latest()
    assert caught.value.path == second.path
    run_command_of(caught.value)
    assert_whole(store, 1, make_state(1))


def test_a_damaged_old_manifest_does_not_stop_a_resume(store, make_state, assert_whole):
    first = store.commit(make_state(1), {"step": 1}, step=1)
    second = store.commit(make_state(2), {"step": 2}, step=2)
    flip(first.path, 20)
    assert store.commits() == [second]
    assert_whole(store, 2, make_state(2))


def test_when_nothing_is_intact_the_error_says_so(store, make_state):
    commit = store.commit(make_state(1), {"step": 1}, step=1)
    object_path(store, commit, "embedding/weights").unlink()
    with pytest.raises(CheckpointError, match="No other commit is intact"):
        store.latest()


def test_a_damaged_object_is_not_reused_by_a_new_commit(store, make_state, assert_whole):
    store.commit(make_state(1), {"step": 1}, step=1)
    commit = store.latest()
    flip(object_path(store, commit, "embedding/weights"))
    object_path(store, commit, "stack:s0/weights").unlink()
    again = Store(store.root).commit(make_state(1), {"step": 2}, step=2)
    assert again.repaired == ("embedding/weights",)
    assert again.bytes_written == sum(again.parts[n].bytes for n in ("embedding/weights", "stack:s0/weights"))
    assert_whole(store, 2, make_state(1))


def test_verify_reads_everything(store, make_state):
    commit = store.commit(make_state(1), {"step": 1}, step=1)
    store.verify(commit)
    flip(object_path(store, commit, "stack:s0/optimizer"))
    with pytest.raises(CheckpointError, match="stack:s0/optimizer"):
        store.verify(commit)


def test_an_unknown_part_names_the_nearest(store, make_state):
    commit = store.commit(make_state(1), {"step": 1}, step=1)
    with pytest.raises(CheckpointError, match="did you mean 'stack:s0/weights'"):
        store.load(commit, "stack:s0/weight")


def test_a_newer_format_is_named(store):
    store.lock().release()
    text = json.dumps({"format": 2}).encode()
    name = f"{1:09d}-{hashlib.sha256(text).hexdigest()[:16]}.json"
    (store.root / "commits" / name).write_bytes(text)
    with pytest.raises(VersionError, match="format 2") as caught:
        store.latest()
    assert caught.value.exit_code == 7


def test_stray_files_are_no_commits(store, make_state, assert_whole):
    store.commit(make_state(1), {"step": 1}, step=1)
    (store.root / "commits" / "notes.txt").write_text("hello")
    (store.root / "commits" / ".000000009-0123456789abcdef.json.swp").write_text("{}")
    (store.root / "refs" / "latest").unlink()
    assert_whole(store, 1, make_state(1))


# Pruning


def test_prune_keeps_the_newest_and_the_pins_and_every_object_they_need(store, make_state):
    for step in range(1, 7):
        store.commit(
            make_state(step), {"step": step}, step=step, pin={2: "stage-00", 4: "stage-01"}.get(step)
        )
    before = store.commits()
    pruned = store.prune(Retention(2))
    assert [commit.step for commit in store.commits()] == [2, 4, 5, 6]
    assert pruned.commits == (before[0].id, before[2].id)
    assert pruned.objects == 4
    for commit in store.commits():
        store.verify(commit)
    listed = {part.sha256 for commit in store.commits() for part in commit.parts.values()}
    assert {path.name for path in (store.root / "objects").glob("*/*")} == listed
    assert store.prune(Retention(2)) == type(pruned)((), 0, 0)


def test_a_pin_moves_to_the_newest_commit_of_its_name(store, make_state):
    for step, pin in ((1, "stage-00"), (2, None), (3, "stage-00"), (4, None)):
        store.commit(make_state(step), {"step": step}, step=step, pin=pin)
    store.prune(Retention(1))
    assert [commit.step for commit in store.commits()] == [3, 4]


def test_a_swept_object_is_written_again_when_it_returns(store, make_state, assert_whole):
    for step in (1, 2):
        store.commit(make_state(step), {"step": step}, step=step)
    store.prune(Retention(1))
    again = store.commit(make_state(1), {"step": 3}, step=3)
    assert again.bytes_written > 0
    assert_whole(Store(store.root), 3, make_state(1))


def test_prune_refuses_when_it_cannot_know_what_is_needed(store, make_state):
    commits = [store.commit(make_state(step), {"step": step}, step=step) for step in (1, 2, 3)]
    before = stored_files(store)
    with pytest.raises(ValueError, match="1 or more"):
        store.prune(Retention(0))
    flip(commits[0].path, 30)
    with pytest.raises(CheckpointError, match="nothing was pruned"):
        store.prune(Retention(1))
    assert stored_files(store) == before


def test_prune_never_leaves_only_a_damaged_commit(store, make_state):
    for step in (1, 2):
        commit = store.commit(make_state(step), {"step": step}, step=step)
    before = stored_files(store)
    flip(object_path(store, commit, "stack:s0/weights"))
    with pytest.raises(CheckpointError, match="stack:s0/weights"):
        Store(store.root).prune(Retention(1))
    assert stored_files(store) == before


def test_a_reader_that_is_overtaken_by_prune_gets_the_newer_commit(store, make_state, monkeypatch):
    store.commit(make_state(1), {"step": 1}, step=1)
    reader = Store(store.root)
    scan = reader.manifests.scan
    first = scan()

    def overtaken():
        monkeypatch.setattr(reader.manifests, "scan", scan)
        store.commit(make_state(2), {"step": 2}, step=2)
        store.prune(Retention(1))
        return first

    monkeypatch.setattr(reader.manifests, "scan", overtaken)
    assert reader.latest().step == 2
    with pytest.raises(CheckpointError, match="was pruned"):
        reader.load(first[0][0], "stack:s0/weights")


def test_all_stored_files_are_read_only(store, make_state):
    commit = store.commit(make_state(1), {"step": 1}, step=1)
    assert commit.path.stat().st_mode & 0o777 == 0o444
    assert object_path(store, commit, "embedding/weights").stat().st_mode & 0o777 == 0o444
    assert files.names(store.root / "tmp") == []
