"""Saving beside the training: what was there at the call is stored, one save at a time, and no error is lost."""

import errno
import os
import threading
import time

import pytest
import torch

from stackwise.checkpoint.errors import CheckpointError, SpaceError
from stackwise.checkpoint.saver import Saver
from stackwise.checkpoint.store import Store
from stackwise.storage import ops


@pytest.fixture
def held(monkeypatch):
    """Writes wait until `held.set()`."""
    gate = threading.Event()
    original = ops.write

    def write(fd, data):
        assert gate.wait(30)
        return original(fd, data)

    monkeypatch.setattr(ops, "write", write)
    yield gate
    gate.set()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_stored_is_what_was_there_at_the_call(store, make_state, assert_whole, asynchronous):
    saver = Saver(store, asynchronous=asynchronous)
    for step in range(1, 6):
        state, expected = make_state(step), make_state(step)
        saver.save(state, {"step": step}, step=step, still={"embedding/weights"})
        for part, tensors in state.items():
            for tensor in tensors.values():
                if part != "embedding/weights":
                    tensor.zero_()  # training goes on
        saver.drain()
        assert_whole(store, step, expected)
        (saved,) = saver.finished()
        assert (saved.step, saver.durable_step, saved.error) == (step, step, None)
        assert saved.blocked_seconds <= saved.seconds
    saver.close()


def test_the_call_returns_while_the_disk_still_works(store, make_state, assert_whole, held):
    saver = Saver(store)
    saver.save(make_state(1), {"step": 1}, step=1, note={"stage": 3})
    assert saver.finished() == []
    assert saver.durable_step is None
    held.set()
    saver.close()
    (saved,) = saver.finished()
    assert (saved.note, saver.durable_step) == ({"stage": 3}, 1)
    assert_whole(store, 1, make_state(1))


def test_jobs_run_in_order_behind_the_save(store, make_state, held):
    saver, seen = Saver(store), []
    saver.save(make_state(1), {"step": 1}, step=1)
    saver.then(lambda: seen.append(store.latest().step))
    assert seen == []
    held.set()
    saver.drain()
    assert seen == [1]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told_and_the_next_one_works(
    store, make_state, assert_whole, monkeypatch, asynchronous
):
    saver = Saver(store, asynchronous=asynchronous)
    saver.save(make_state(1), {"step": 1}, step=1)
    saver.drain()
    with monkeypatch.context() as patch:

        def full(fd, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(ops, "write", full)
        saver.save(make_state(2), {"step": 2}, step=2)
        saver.drain()
    first, second = saver.finished()
    assert first.error is None
    assert isinstance(second.error, SpaceError)
    assert (second.step, second.commit, saver.durable_step) == (2, None, 1)
    assert_whole(store, 1, make_state(1))
    saver.save(make_state(3), {"step": 3}, step=3)
    saver.close()
    assert_whole(store, 3, make_state(3))


def test_no_room_is_told_before_anything_is_copied(store, make_state, monkeypatch):
    state = make_state(1)
    need = sum(t.nbytes for name in ("embedding/weights", "stack:s0/weights") for t in state[name].values())
    with store.lock():
        saver = Saver(store)
        monkeypatch.setattr(
            "shutil.disk_usage", lambda path: type("Usage", (), {"free": 100, "total": 0, "used": 0})()
        )
        with pytest.raises(SpaceError, match=rf"need {need} bytes, have 100 bytes"):
            saver.save(state, {}, step=1, still={"stack:s0/optimizer"})
        assert store.latest() is None


def test_a_disk_that_hangs_is_an_error_in_the_end(store, make_state, held, monkeypatch):
    monkeypatch.setattr("stackwise.checkpoint.saver.TIMEOUT", 0.05)
    saver = Saver(store)
    saver.save(make_state(1), {}, step=1)
    with pytest.raises(CheckpointError, match="its disk hangs"):
        saver.save(make_state(2), {}, step=2)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_frozen_part_that_changes_is_found_and_named(store, make_state, assert_whole, asynchronous):
    saver = Saver(store, asynchronous=asynchronous)
    state = make_state(1)
    frozen = {"embedding/weights"}
    saver.watch({name: state[name] for name in frozen})
    saver.save(state, {"step": 1}, step=1, still=frozen)
    saver.drain()
    expected = make_state(1)
    state["embedding/weights"]["weight"][2, 1] = (
        -0.0 if state["embedding/weights"]["weight"][2, 1] == 0 else 7
    )
    saver.save(state, {"step": 2}, step=2, still=frozen)
    saver.drain()
    _, second = saver.finished()
    assert isinstance(second.error, CheckpointError)
    assert second.error.exit_code == 3
    assert "'embedding/weights' is frozen, yet its bytes changed (weight)" in str(second.error)
    assert_whole(store, 1, expected)
    saver.watch({})
    saver.save(state, {"step": 3}, step=3)
    saver.close()
    assert saver.finished()[0].error is None


def test_buffers_are_used_again_and_no_longer_than_needed(store, make_state):
    saver = Saver(store)
    saver.save(make_state(1), {}, step=1)
    saver.drain()
    places = {key: held.data_ptr() for key, held in saver._buffers.items()}
    saver.save(make_state(2), {}, step=2)
    saver.drain()
    assert {key: held.data_ptr() for key, held in saver._buffers.items()} == places
    saver.save({"other/weights": {"w": torch.ones(2)}}, {}, step=3)
    saver.drain()
    assert list(saver._buffers) == [("other/weights", "w")]
    saver.close()
    assert Store(store.root).latest().step == 3


def test_nothing_runs_on_after_close(store):
    """A thread that frees tensors while Python shuts down ends the process by SIGABRT."""

    class Slow:
        freed = False

        def __del__(self):
            time.sleep(0.2)
            Slow.freed = True

    before = set(threading.enumerate())
    saver, slow = Saver(store), Slow()
    saver.then(lambda slow=slow: None)
    del slow
    saver.close()
    assert Slow.freed
    assert set(threading.enumerate()) <= before
    saver.close()
