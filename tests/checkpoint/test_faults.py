"""Kills, full disks, failing syncs and second writers: the store always holds a whole commit."""

import errno
import fcntl
import json
import os
import resource
import signal
import stat

import pytest

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import CheckpointError, LockError, SpaceError
from stackwise.checkpoint.retention import Retention
from stackwise.checkpoint.store import Store
from stackwise.storage import ops


def save(root, state, step):
    Store(root).commit(state, {"step": step}, step=step)


WRITES = [point for point in ops.CRASH_POINTS if point.startswith(("object", "manifest", "latest"))]
PRUNES = [point for point in ops.CRASH_POINTS if point.startswith("prune.")]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", WRITES)
def test_a_kill_during_a_commit_leaves_the_old_commit_or_the_new_one(
    store, make_state, assert_whole, child, killed, point, nth
):
    save(store.root, make_state(1), 1)
    code = child(lambda: save(store.root, make_state(2), 2), crash_at=f"{point}:{nth}")
    passes_twice = point.startswith("object.")  # two objects change; the manifest is written once
    assert code == (killed if nth == 1 or passes_twice else 0)

    done = code == 0 or point in ("manifest.renamed", "manifest.durable") or point.startswith("latest.")
    assert_whole(Store(store.root), 2 if done else 1, make_state(2 if done else 1))
    # the next writer finds the lock free, sweeps what the dead one left, and goes on
    save(store.root, make_state(3), 3)
    assert_whole(store, 3, make_state(3))
    assert files.names(store.root / "tmp") == []
    store.prune(Retention(1))
    assert len(list((store.root / "objects").glob("*/*"))) == 3


@pytest.mark.parametrize("point", WRITES)
def test_a_kill_during_the_first_commit_leaves_none_or_it(
    store, make_state, assert_whole, child, killed, point
):
    assert child(lambda: save(store.root, make_state(1), 1), crash_at=point) == killed
    if point in ("manifest.renamed", "manifest.durable") or point.startswith("latest."):
        assert_whole(store, 1, make_state(1))
    else:
        assert store.latest() is None
    save(store.root, make_state(1), 1)
    assert_whole(store, 1, make_state(1))


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", PRUNES)
def test_a_kill_during_prune_leaves_only_garbage_and_the_next_prune_ends_it(
    store, make_state, assert_whole, child, killed, point, nth
):
    for step in range(1, 5):
        save(store.root, make_state(step), step)
    code = child(lambda: Store(store.root).prune(Retention(1)), crash_at=f"{point}:{nth}")
    assert code == (killed if nth == 1 or point != "prune.manifests-durable" else 0)
    for commit in store.commits():
        store.verify(commit)
    assert_whole(store, 4, make_state(4))
    store.prune(Retention(1))
    assert [commit.step for commit in store.commits()] == [4]
    assert len(list((store.root / "objects").glob("*/*"))) == 3


def test_every_byte_is_synced_before_its_name_and_every_name_before_the_manifest(
    store, make_state, monkeypatch
):
    save(store.root, make_state(1), 1)
    calls = []

    def spy(name, describe):
        original = getattr(ops, name)

        def call(*arguments):
            described = describe(*arguments)
            result = original(*arguments)
            calls.append((name, described))
            return result

        monkeypatch.setattr(ops, name, call)

    spy("write", lambda fd, data: os.fstat(fd).st_ino)
    spy("fsync", lambda fd: os.fstat(fd).st_ino)
    spy("rename", lambda source, target: target)
    commit = Store(store.root).commit(make_state(2), {"step": 2}, step=2)

    def when(name, what):
        return [index for index, call in enumerate(calls) if call == (name, what)]

    renamed = [path for name, path in calls if name == "rename"]
    assert len(renamed) == 4  # two objects, the manifest, refs/latest
    for path in renamed:
        node = path.stat().st_ino
        assert when("write", node)[-1] < when("fsync", node)[0] < when("rename", path)[0]
    manifest = when("rename", commit.path)[0]
    for part in commit.parts.values():  # the one found in the store too: its writer may have died early
        folder = store.root / "objects" / part.sha256[:2]
        for path in (folder, folder.parent):
            synced = [index for index in when("fsync", path.stat().st_ino) if index < manifest]
            renames = when("rename", folder / part.sha256)
            assert synced
            assert not renames or renames[0] < synced[-1]
    after = when("fsync", (store.root / "commits").stat().st_ino)
    assert any(index > manifest for index in after)
    assert manifest < when("rename", store.root / "refs" / "latest")[0]


# Full and failing disks


def fail_nth(monkeypatch, name, nth, code):
    original = getattr(ops, name)
    count = [0]

    def call(*arguments):
        count[0] += 1
        if count[0] == nth:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    monkeypatch.setattr(ops, name, call)
    return count


def calls_of(monkeypatch, name, action):
    with monkeypatch.context() as patch:
        count = fail_nth(patch, name, -1, 0)
        action()
    return count[0]


def snapshot(store):
    return sorted(path for path in store.root.rglob("*") if path.is_file())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_at_any_write_leaves_the_store_as_it_was(
    tmp_path, make_state, assert_whole, monkeypatch, code
):
    save(tmp_path / "count", make_state(1), 1)
    count = calls_of(monkeypatch, "write", lambda: save(tmp_path / "count", make_state(2), 2))
    for nth in range(1, count + 1):
        store = Store(tmp_path / str(nth))
        save(store.root, make_state(1), 1)
        before = snapshot(store)
        with monkeypatch.context() as patch:
            fail_nth(patch, "write", nth, code)
            with pytest.raises(SpaceError, match=r"need .* have .* intact") as caught:
                save(store.root, make_state(2), 2)
        assert caught.value.exit_code == 6
        assert files.names(store.root / "tmp") == []
        if nth == count:  # refs/latest comes after the commit
            assert_whole(Store(store.root), 2, make_state(2))
        else:
            assert snapshot(store) == before
            assert_whole(Store(store.root), 1, make_state(1))
        save(store.root, make_state(2), 3)
        assert_whole(store, 3, make_state(2))


def test_a_real_limit_on_file_size_is_no_space(store, make_state, assert_whole, child):
    save(store.root, make_state(1), 1)
    before = snapshot(store)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
        with pytest.raises(SpaceError):
            save(store.root, make_state(2), 2)

    assert child(limited) == 0
    assert snapshot(store) == before
    assert_whole(store, 1, make_state(1))


def test_a_failed_sync_is_retried_on_a_new_file_only(store, make_state, assert_whole, monkeypatch):
    save(store.root, make_state(1), 1)
    original = ops.fsync
    failed, synced = [], []

    def fsync(fd):
        info = os.fstat(fd)
        synced.append(info.st_ino)
        if not failed and stat.S_ISREG(info.st_mode):
            failed.append((info.st_ino, os.dup(fd)))  # a copy, so that no new file gets the same number
            raise OSError(errno.EIO, "Input/output error")
        original(fd)

    monkeypatch.setattr(ops, "fsync", fsync)
    save(store.root, make_state(2), 2)
    ((node, copy),) = failed
    os.close(copy)
    assert synced.count(node) == 1
    assert_whole(store, 2, make_state(2))


def test_a_disk_that_keeps_failing_is_an_error_at_once(store, make_state, assert_whole, monkeypatch):
    save(store.root, make_state(1), 1)
    before = snapshot(store)
    for name, code in (("write", errno.EIO), ("fsync", errno.EIO), ("rename", errno.EACCES)):

        def broken(*arguments, code=code):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            with store.lock():  # taken while the disk still works
                patch.setattr(ops, name, broken)
                with pytest.raises(CheckpointError, match="intact") as caught:
                    store.commit(make_state(2), {"step": 2}, step=2)
            assert caught.value.exit_code == 3
        assert snapshot(store) == before
        assert_whole(Store(store.root), 1, make_state(1))


def test_an_interrupt_inside_a_commit_leaves_the_store_as_it_was(
    store, make_state, assert_whole, monkeypatch
):
    save(store.root, make_state(1), 1)
    before = snapshot(store)

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(store.root, make_state(2), 2)
    assert snapshot(store) == before


def test_an_interrupt_after_the_manifest_stands_keeps_its_objects(
    store, make_state, assert_whole, monkeypatch
):
    save(store.root, make_state(1), 1)

    def interrupted(point):
        if point == "manifest.renamed":
            raise KeyboardInterrupt

    monkeypatch.setattr(ops, "crashpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(store.root, make_state(2), 2)
    assert_whole(store, 2, make_state(2))


# Two writers


def test_the_second_writer_fails_at_once_and_names_the_first(store, make_state, assert_whole):
    with store.lock():
        store.commit(make_state(1), {"step": 1}, step=1)
        other = Store(store.root)
        for write in (
            other.lock,
            lambda: save(store.root, make_state(2), 2),
            lambda: other.prune(Retention(1)),
        ):
            with pytest.raises(LockError) as caught:
                write()
            holder = json.loads((store.root / "LOCK").read_text())
            assert caught.value.exit_code == 4
            for key in ("host", "pid", "start"):
                assert str(holder[key]) in str(caught.value)
            assert holder["pid"] == os.getpid()
        # readers need no lock
        assert_whole(other, 1, make_state(1))
        other.verify(other.latest())
    save(store.root, make_state(2), 2)
    assert_whole(store, 2, make_state(2))


def test_writers_in_other_processes_exclude_each_other(store, make_state, child):
    with store.lock():

        def refused():
            with pytest.raises(LockError, match=f"pid {os.getppid()}"):
                save(store.root, make_state(1), 1)

        assert child(refused) == 0
    assert child(lambda: save(store.root, make_state(1), 1)) == 0


def test_the_lock_is_free_as_soon_as_its_holder_is_killed_even_with_children_left(store, child, killed):
    left, told = os.pipe()

    def die_with_a_child_alive():
        lock = store.lock()
        if os.fork() == 0:
            os.write(told, str(os.getpid()).encode())
            signal.pause()
        assert lock.held
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(die_with_a_child_alive) == killed
    grandchild = int(os.read(left, 20))
    try:
        os.kill(grandchild, 0)
        store.lock().release()
    finally:
        os.kill(grandchild, signal.SIGKILL)
        os.close(left)
        os.close(told)


def test_a_forked_child_does_not_have_its_parents_lock(store, make_state, child):
    with store.lock() as lock:

        def child_writes():
            assert not lock.held
            with pytest.raises(LockError):
                store.commit(make_state(1), {"step": 1}, step=1)

        assert child(child_writes) == 0
        assert lock.held
        with pytest.raises(LockError):  # the child's end did not unlock it
            Store(store.root).lock()


def test_a_file_system_without_locks_is_refused(store, monkeypatch):
    def flock(fd, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(LockError, match="local disk"):
        store.lock()
