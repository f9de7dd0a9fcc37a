"""Which commits prune leaves: the newest, the best, every so many steps, stage ends, pins, the last verified."""

import hashlib
import json
import os
import random
import time

import pytest
import torch

from stackwise.checkpoint.errors import CheckpointError, CommitNameError
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.checkpoint.upkeep import remember, repair


@pytest.fixture
def filled(store, make_state):
    """Eight commits of steps 10 to 80, stage ends at 30 and 60."""
    for step in range(10, 90, 10):
        pin = {30: "stage-01", 60: "stage-02"}.get(step)
        store.commit(make_state(step), {"step": step}, step=step, pin=pin)
    return store


def steps(store):
    return [commit.step for commit in store.commits()]


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [30, 60, 80]),
        (Retention(last=3), [30, 60, 70, 80]),
        (Retention(stages=False), [80]),
        (Retention(best=2, stages=False), [20, 50, 80]),
        (Retention(every=20, stages=False), [20, 40, 60, 80]),
        (Retention(last=2, best=1, every=40), [30, 40, 50, 60, 70, 80]),
    ],
)
def test_prune_leaves_what_is_asked_for(filled, retention, left):
    for step, loss in ((20, 1.5), (40, 1.75), (50, 1.25), (70, 2.0)):
        assert filled.score(step, loss).step == step
    pruned = filled.prune(retention)
    assert steps(filled) == left
    assert set(pruned.kept) == {commit.id for commit in filled.commits()}
    for commit in filled.commits():
        filled.verify(commit)


def test_impossible_retentions_are_refused():
    for wrong in ({"last": 0}, {"best": -1}, {"every": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            Retention(**wrong)


def test_of_several_commits_of_a_step_the_newest_counts(store, make_state):
    for number, step in enumerate((10, 20, 10, 20, 15)):
        store.commit(make_state(number), {"n": number}, step=step)
    assert store.score(10, 1.0).number == 3
    assert store.find("step:20").number == 4
    store.prune(Retention(every=10))
    assert [commit.number for commit in store.commits()] == [3, 4, 5]


def test_equal_losses_keep_the_older_commit(filled):
    for step in (20, 40, 50):
        filled.score(step, 1.0)
    filled.prune(Retention(best=1, stages=False))
    assert steps(filled) == [20, 80]


def test_a_loss_of_no_commit_or_no_number_is_not_noted(filled):
    assert filled.score(25, 1.0) is None
    assert filled.score(20, float("nan")) is None
    assert filled.scores() == {}
    with pytest.raises(CommitNameError, match="none is the best"):
        filled.find("best")


def test_a_dry_run_says_what_a_prune_then_does_and_changes_nothing(filled):
    before = sorted(path for path in filled.root.rglob("*") if path.is_file())
    with Store(filled.root).lock():  # another writer does not stop it
        would = filled.prune(Retention(2), dry_run=True)
    assert sorted(path for path in filled.root.rglob("*") if path.is_file()) == before
    did = filled.prune(Retention(2))
    assert did == would
    assert did.kept == would.kept
    assert did.bytes > 0


def test_pins_by_hand_keep_their_commit_until_they_are_removed(filled):
    commit = filled.find("step:20")
    filled.pin("good", commit)
    filled.pin("good", commit)  # again: nothing changes
    assert Store(filled.root).pins() == {
        "good": commit.id,
        "stage-01": filled.find("step:30").id,
        "stage-02": filled.find("step:60").id,
    }
    filled.prune(Retention(stages=False))
    assert steps(filled) == [20, 80]
    assert filled.find("good") == commit
    assert filled.unpin("good") == commit.id
    filled.prune(Retention(stages=False))
    assert steps(filled) == [80]


@pytest.mark.parametrize(
    "name", ["", "latest", "best", "stage-04", "a/b", "..", "1st", "x" * 65, "face", "a b"]
)
def test_names_that_mean_something_else_are_no_pins(filled, name):
    with pytest.raises(CommitNameError, match="cannot be called") as caught:
        filled.pin(name, filled.latest())
    assert caught.value.exit_code == 2


def test_a_pin_that_is_taken_stays_where_it_is(filled):
    filled.pin("good", filled.find("step:20"))
    with pytest.raises(CommitNameError, match="already"):
        filled.pin("good", filled.find("step:40"))
    with pytest.raises(CommitNameError, match="did you mean 'good'"):
        filled.unpin("godo")
    with pytest.raises(CommitNameError, match="--drop-stages"):
        filled.unpin("stage-01")
    assert filled.find("good").step == 20


@pytest.mark.parametrize("at", [0, 5, 15])
def test_a_damaged_pin_stops_prune_and_repair_sets_it_aside(filled, at):
    filled.pin("good", filled.find("step:20"))
    flip(filled.root / "refs" / "pins" / "good", at)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=r"pin .*good is damaged"):
            filled.prune(dry_run=dry_run)
    assert len(filled.commits()) == 8
    assert [damage.path.name for damage in repair(filled).moved] == ["good"]
    assert (filled.root / "quarantine" / "good").exists()
    filled.prune()
    assert steps(filled) == [30, 60, 80]


def test_any_flipped_bit_of_the_scores_is_found_and_stops_only_what_needs_them(filled):
    filled.score(20, 1.5)
    filled.score(50, 1.25)
    path = filled.root / "refs" / "scores"
    whole = path.read_bytes()
    path.chmod(0o644)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << random.randrange(8)
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match="ckpt repair"):
            filled.scores()
    with pytest.raises(CheckpointError, match="validation losses"):
        filled.prune(Retention(best=1))
    assert len(filled.commits()) == 8
    scores = {filled.find("step:20").id: 1.5, "000000001-0123456789abcdef": 9.0}
    repair(filled, scores)
    assert filled.scores() == {filled.find("step:20").id: 1.5}
    filled.prune(Retention(best=1, stages=False))
    assert steps(filled) == [20, 80]


@pytest.mark.parametrize(
    "text", ["[]", '{"a": null}', '{"a": [1]}', "{", "[" * 100_000, '{"a": "b"}', '{"a": 1' + "0" * 400 + "}"]
)
def test_a_table_that_is_none_is_damaged_whatever_its_hash_says(filled, text):
    head = hashlib.sha256(text.encode()).hexdigest()
    (filled.root / "refs" / "scores").write_text(f"{head}\n{text}")
    with pytest.raises(CheckpointError, match="validation losses"):
        filled.scores()
    assert list(filled.damaged()) == [filled.root / "refs" / "scores"]


def test_the_last_verified_commit_is_never_pruned(filled):
    with filled.lock():
        remember(filled, [filled.find("step:20").id, filled.find("step:40").id])
    filled.prune(Retention(stages=False))
    assert steps(filled) == [40, 80]
    (filled.root / "refs" / "verified").unlink()
    filled.prune(Retention(stages=False))
    assert steps(filled) == [80]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_depends_on_the_clock(tmp_path, make_state, monkeypatch, seed):
    """Clocks that jump a year back or ten ahead, and equal times of files, change neither order nor choice."""
    rng = random.Random(seed)
    year = 365 * 86400
    now = time.time()
    kept = []
    for jumps in (False, True):
        store = Store(tmp_path / str(jumps) / "store")
        for step in range(1, 8):
            if jumps:
                shift = rng.choice([-year, 10 * year, 0])
                monkeypatch.setattr(time, "time", lambda shift=shift: now + shift)
            store.commit(make_state(step), {"step": step}, step=step, pin="stage-01" if step == 3 else None)
            store.score(step, 1.0 + (step * 5) % 7)
            if jumps:
                for path in store.root.rglob("*"):
                    when = now + rng.choice([-year, 0, 0, 10 * year])
                    os.utime(path, (when, when))
        if jumps:
            with store.lock():
                remember(store, [])
        store.prune(Retention(last=2, best=2, every=4))
        assert store.latest().step == 7
        kept.append([commit.id for commit in store.commits()])
        monkeypatch.undo()
    assert kept[0] == kept[1]


# Names


def test_commits_are_found_by_what_they_are_called(filled):
    commits = filled.commits()
    filled.pin("good", commits[1])
    filled.score(50, 0.5)
    for name, step in {
        "latest": 80,
        "best": 50,
        "good": 20,
        "stage-02": 60,
        "step:40": 40,
        commits[3].id: 40,
        commits[3].id[:12]: 40,
        commits[3].sha256[:10]: 40,
    }.items():
        assert filled.find(name).step == step


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lastest", "did you mean 'latest'"),
        ("stage-2", "did you mean 'stage-02'"),
        ("step:45", "did you mean"),
        ("0000000", "several commits"),
        ("fffffffffffff", "there are"),
        ("../latest", "did you mean"),
        ("", "there are"),
    ],
)
def test_a_wrong_name_gets_the_nearest_or_the_list(filled, name, hint):
    with pytest.raises(CommitNameError, match=hint) as caught:
        filled.find(name)
    assert caught.value.exit_code == 2


def test_an_empty_store_has_no_commit_of_any_name(store):
    for name in ("latest", "best", "step:1", "abc"):
        with pytest.raises(CommitNameError, match="no commit yet"):
            store.find(name)


def test_scores_of_commits_that_are_gone_are_dropped(filled):
    filled.score(20, 1.0)
    filled.prune(Retention(stages=False))
    filled.score(80, 2.0)
    assert list(filled.scores().values()) == [2.0]
    table = (filled.root / "refs" / "scores").read_text().splitlines()[1]
    assert len(json.loads(table)) == 1


def test_parts_may_be_equal_and_objects_shared(store):
    same = {"a/weights": {"w": torch.ones(3)}, "b/weights": {"w": torch.ones(3)}}
    for step in (1, 2):
        store.commit(same, {}, step=step)
    store.prune()
    assert store.load(store.latest(), "b/weights")["w"].tolist() == [1, 1, 1]
