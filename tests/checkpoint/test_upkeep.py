"""Damage is found, set aside and taken back; what prune, readers and kills do to each other."""

import os
import random
import signal

import pytest

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import CheckpointError, CommitNameError, LockError
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.checkpoint.upkeep import examine, repair, usage
from stackwise.storage import ops


def save(root, state, step, pin=None):
    return Store(root).commit(state, {"step": step}, step=step, pin=pin)


def hurt(path, how, other=None, rng=random):
    """Damage one file in one of the ways in which disks do; the bytes it had."""
    content = path.read_bytes()
    path.chmod(0o644)
    if how == "missing":
        path.unlink()
    elif how == "swapped":
        path.write_bytes(other.read_bytes())
    else:
        at = rng.randrange(len(content))
        path.write_bytes(
            {
                "flipped": content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
                "cut": content[:at],
                "zeros": bytes(len(content)),
                "longer": content + b"\0",
            }[how]
        )
    return content


def objects(store):
    return sorted(path for path in (store.root / "objects").glob("*/*"))


def test_a_whole_store_is_whole(store, make_state):
    for step in (1, 2):
        save(store.root, make_state(step), step)
    found = examine(store)
    assert (found.objects, found.damage) == (5, ())
    assert found.whole == tuple(commit.id for commit in store.commits())
    assert found.bytes == sum(path.stat().st_size for path in objects(store))


@pytest.mark.parametrize("how", ["missing", "flipped", "cut", "zeros", "longer", "swapped"])
def test_damage_names_the_file_its_parts_and_every_commit_hurt(store, make_state, how):
    commits = [save(store.root, make_state(step), step) for step in (1, 1, 2)]
    part = commits[0].parts["stack:s0/weights"]
    path = store.objects.path(part.sha256)
    hurt(path, how, other=store.objects.path(commits[2].parts["stack:s0/weights"].sha256))
    (damage,) = examine(store).damage
    assert (damage.path, damage.parts) == (path, ("stack:s0/weights",))
    assert damage.commits == (commits[0].id, commits[1].id)
    assert examine(store).whole == (commits[2].id,)
    assert examine(store, [commits[2]]).damage == ()


def test_a_share_of_the_objects_is_read_and_only_whole_commits_count(store, make_state):
    for step in range(10):
        save(store.root, make_state(step), step)
    for share, count in ((0.1, 2), (0.5, 10), (1.0, 21)):
        assert examine(store, share=share).objects == count
    found = examine(store, share=0.05)
    assert (found.objects, found.whole) == (1, ())
    # every object is drawn sooner or later
    hurt(objects(store)[7], "flipped")
    assert any(examine(store, share=0.3).damage for _ in range(60))


@pytest.mark.parametrize("seed", range(12))
def test_repair_sets_aside_what_is_hurt_and_nothing_else_and_takes_it_back(store, make_state, seed):
    rng = random.Random(seed)
    state = {}
    for step in range(1, 7):
        state[step] = make_state(rng.randrange(4))
        save(store.root, state[step], step, pin="stage-01" if step == 3 else None)
    before = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    victims = rng.sample([*objects(store), *(commit.path for commit in store.commits())], rng.randint(1, 3))
    whole = {
        path: hurt(path, rng.choice(["missing", "flipped", "cut", "zeros"]), rng=rng) for path in victims
    }
    expected = [
        commit.step
        for commit in Store(store.root).commits()
        if not {store.objects.path(part.sha256) for part in commit.parts.values()} & whole.keys()
    ]
    store = Store(store.root)
    done = repair(store)
    assert [commit.step for commit in store.commits()] == expected
    assert examine(store).damage == ()
    if expected:
        assert store.latest().step == expected[-1]
        assert (store.root / "refs" / "latest").read_text().strip() == store.latest().id
    if expected and not any(path.suffix == ".json" for path in whole):
        store.prune(Retention(last=100))  # what a manifest in quarantine lists stays
    assert repair(store).moved == ()
    # the lost files come back from a copy, and with them their commits
    for path, content in whole.items():
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            path.chmod(0o644)
        path.write_bytes(content)
    again = repair(Store(store.root))
    assert [commit.step for commit in store.commits()] == list(range(1, 7))
    assert len(again.restored) + sum(path.suffix == ".json" for path in whole) >= 6 - len(expected)
    now = {p: p.read_bytes() for p in store.root.rglob("*") if p.is_file() and p.parent.name != "quarantine"}
    skip = {store.root / "LOCK", store.root / "refs" / "verified"}
    assert {p: b for p, b in now.items() if p not in skip} == {
        p: b for p, b in before.items() if p not in skip
    }
    assert done.moved or all(
        path.suffix == ".json" for path in whole
    )  # a manifest that is gone is not there to move


def test_a_newest_manifest_that_is_gone_is_never_passed_over(store, make_state):
    with pytest.raises(CommitNameError):
        store.find("latest")
    first, second = (save(store.root, make_state(step), step) for step in (1, 2))
    content = hurt(second.path, "missing")
    for look in (store.latest, lambda: store.find("latest")):
        with pytest.raises(CheckpointError, match=f"is gone: .*Not hurt: {first.id}"):
            look()
    second.path.write_bytes(content)
    (store.root / "refs" / "latest").chmod(0o644)
    (store.root / "refs" / "latest").write_text(f"{first.id}\n")  # it lags behind, and prune puts it right
    assert store.latest().step == 2
    store.prune()
    assert store.latest().step == 2
    second.path.unlink()
    with pytest.raises(CheckpointError, match="No other commit is intact"):
        store.latest()
    assert repair(store).whole == ()
    with pytest.raises(
        CheckpointError, match="is gone"
    ):  # nothing is left, and nobody may take that for a new run
        store.latest()


def test_files_of_one_name_are_set_aside_beside_each_other(store, make_state):
    commit = save(store.root, make_state(1), 1)
    path = store.objects.path(commit.parts["stack:s0/weights"].sha256)
    for number in range(3):
        hurt(path, "flipped")
        repair(store)
        assert len(list(store.quarantine.glob(f"{path.name}*"))) == number + 1
        save(store.root, make_state(1), 1)


def test_a_pin_on_a_commit_in_quarantine_waits_for_it(store, make_state):
    first = save(store.root, make_state(1), 1)
    second = save(store.root, make_state(2), 2)
    store.pin("good", first)
    path = store.objects.path(first.parts["stack:s0/weights"].sha256)
    content = hurt(path, "missing")
    repair(store)
    store.prune()
    with pytest.raises(CommitNameError, match="no commit"):
        store.find("good")
    path.write_bytes(content)
    repair(Store(store.root))
    assert store.find("good").id == first.id
    store.prune()
    assert [commit.id for commit in store.commits()] == [first.id, second.id]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_kill_in_repair_loses_nothing_and_the_next_repair_ends_it(store, make_state, child, killed, nth):
    for step in (1, 1, 2, 3):
        save(store.root, make_state(step), step)
    first = store.commits()[0]
    hurt(store.objects.path(first.parts["stack:s0/weights"].sha256), "flipped")
    names = sorted(path.name for path in store.root.rglob("*") if path.is_file())
    assert child(lambda: repair(Store(store.root)), crash_at=f"repair.moved:{nth}") == killed
    assert sorted(path.name for path in store.root.rglob("*") if path.is_file()) == names
    repair(store)
    assert [commit.step for commit in store.commits()] == [2, 3]
    assert len(list(store.quarantine.iterdir())) == 3


def test_usage_counts_every_byte_once(store, make_state):
    for step in (1, 2, 2):
        save(store.root, make_state(step), step)
    (store.root / "objects" / "ab").mkdir(exist_ok=True)
    (store.root / "objects" / "ab" / ("ab" * 32)).write_bytes(b"garbage")
    (store.root / "quarantine" / "old").write_bytes(b"12345")
    used = usage(store)
    files = {p: p.stat().st_size for p in store.root.rglob("*") if p.is_file()}
    assert used.unreferenced == 7
    assert used.quarantine == 5
    assert used.total == sum(
        size for path, size in files.items() if path.parent.name != "refs" and path.name != "LOCK"
    )
    assert sum(used.parts.values()) == used.objects
    assert set(used.parts) == set(make_state(1))
    first, second, third = store.commits()
    assert used.unique[first.id] == sum(
        part.bytes for name, part in first.parts.items() if name != "embedding/weights"
    )
    assert used.unique[second.id] == used.unique[third.id] == 0
    freed = store.prune(Retention()).bytes
    assert freed == 7 + used.unique[first.id]


# Prune beside readers, writers and kills


@pytest.mark.parametrize("seed", range(5))
def test_prune_and_saves_beside_readers_never_take_what_a_commit_lists(store, make_state, seed):
    """A child saves and prunes all the time; each read gives a whole commit, or says that it was pruned."""
    save(store.root, make_state(0), 0)
    pid = os.fork()
    if pid == 0:
        try:
            rng, writer = random.Random(seed), Store(store.root)
            with writer.lock():
                for step in range(1, 40):
                    writer.commit(make_state(step), {"step": step}, step=step)
                    if rng.random() < 0.7:
                        writer.prune(Retention(last=rng.randint(1, 2)))
        finally:
            os._exit(0)
    excuses = set()
    try:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            reader = Store(store.root)
            try:
                commit = reader.latest()
                for part in commit.parts:
                    loaded = reader.load(commit, part)
                    wanted = make_state(commit.step)[part]
                    assert all((loaded[name] == wanted[name]).all() for name in wanted)
            except CheckpointError as error:
                excuses.add("was pruned" if "was pruned" in str(error) else str(error))
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert excuses <= {"was pruned"}
    assert store.latest().step == 39
    assert examine(store).damage == ()


def test_a_reader_whose_list_went_stale_lists_again(store, make_state, monkeypatch):
    """Between listing the manifests and reading them all were replaced: the store is not empty for all that."""
    save(store.root, make_state(1), 1)
    listing = files.names

    def then_prune(folder):
        names = listing(folder)
        if folder.name == "commits" and names:
            monkeypatch.setattr(files, "names", listing)
            save(store.root, make_state(2), 2)
            Store(store.root).prune()
        return names

    monkeypatch.setattr(files, "names", then_prune)
    assert store.latest().step == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_writer_killed_anywhere_while_it_saves_and_prunes_leaves_only_garbage(
    store, make_state, child, killed, seed
):
    rng = random.Random(seed)
    points = [
        p for p in ops.CRASH_POINTS if p.startswith(("prune.", "object", "manifest", "latest", "reference"))
    ]

    def work():
        writer = Store(store.root)
        with writer.lock():
            newest = writer.latest()
            for step in range(newest.step + 1 if newest else 1, 30):
                writer.commit(make_state(step), {"step": step}, step=step)
                writer.score(step, 1.0 + step % 3)
                writer.prune(Retention(last=2, best=1))

    for _ in range(4):
        code = child(work, crash_at=f"{rng.choice(points)}:{rng.randint(1, 9)}")
        assert code in (killed, 0)
        found = examine(Store(store.root))
        assert found.damage == ()
        assert len(found.whole) == len(store.commits())
    child(work)
    store.prune(Retention(last=2, best=1))
    listed = {part.sha256 for commit in store.commits() for part in commit.parts.values()}
    assert {path.name for path in objects(store)} == listed
    assert store.latest().step == 29


def test_of_several_writers_one_wins_and_the_others_name_it(store, make_state):
    """Eight processes save, prune and pin at the same time; each works or is refused at once."""
    save(store.root, make_state(0), 0)
    children = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            code, named, refused = 1, 0, 0
            try:
                writer = Store(store.root)
                for step in range(3):
                    try:
                        with writer.lock():
                            writer.commit(make_state(number), {"by": number}, step=10 * number + step)
                            writer.prune(Retention(last=2))
                    except LockError as error:
                        named += "pid" in str(error) or "not yet written" in str(error)
                        refused += 1
                code = 0 if named == refused else 2
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * 8
    assert examine(store).damage == ()
    numbers = [commit.number for commit in store.commits()]
    assert numbers == sorted(set(numbers))
    store.lock().release()
