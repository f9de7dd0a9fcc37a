"""Kills, flipped bits, full disks and second writers: a store never gives what was not written whole."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import warnings

import pytest
import torch

from stackwise.storage import ops
from stackwise.storage.lock import FileLock
from stackwise.trunk import disk
from stackwise.trunk.errors import CacheError, CacheInUseError
from stackwise.trunk.layout import Header
from stackwise.trunk.listing import remove_store, verify_store

IDS = torch.arange(12)


def killed_at(monkeypatch, name: str, nth: int, half: bool = False) -> None:
    """Die at the n-th call of a file operation; with `half` after it has done half its work."""
    original, calls = getattr(ops, name), []

    def call(*arguments):
        calls.append(name)
        if len(calls) == nth:
            if half:
                fd, data, offset = arguments
                os.pwrite(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    monkeypatch.setattr(ops, name, call)


WRITES = [("pwrite", nth, half) for nth in range(1, 12) for half in (False, True)]
SYNCS = [(name, nth, False) for name in ("fsync", "sync_dir") for nth in range(1, 4)]


@pytest.mark.parametrize(("name", "nth", "half"), WRITES + SYNCS)
def test_a_kill_leaves_whole_entries_and_the_next_writer_goes_on(kit, tmp_path, monkeypatch, name, nth, half):
    x = kit.entries(12)
    monkeypatch.setattr(disk, "FLUSH_BYTES", 3 * kit.ENTRY)
    monkeypatch.setattr("stackwise.trunk.layout.SHARD_BYTES", 4 * kit.ENTRY)

    def work():
        killed_at(monkeypatch, name, nth, half)
        store = kit.store(tmp_path)
        for i in range(12):
            store.write(IDS[i : i + 1], x[i : i + 1])
        store.close()

    assert kit.child(work) == -signal.SIGKILL
    store = kit.store(tmp_path)
    found = store.has(IDS)
    assert found.tolist() == sorted(found.tolist(), reverse=True), (
        "the youngest are missing, nothing in between"
    )
    assert half or len(store) % 3 == 0, "the index grows by whole flushes"
    if found.any():
        assert torch.equal(store.read(IDS[found]), x[found])
    store.write(IDS, x)
    assert torch.equal(store.read(IDS), x)
    store.close()
    assert verify_store(store.disk.folder) == (12, [])
    assert store.stats.disk_bytes == kit.size(tmp_path), "what the dead writer left is gone"
    again = kit.store(tmp_path)
    assert torch.equal(again.read(IDS), x)
    assert again.stats.damaged == 0


def test_entries_are_on_the_disk_before_the_index_names_them(kit, tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []

    def spy(name):
        original = getattr(ops, name)

        def call(fd, *rest):
            calls.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
            return original(fd, *rest)

        monkeypatch.setattr(ops, name, call)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    spy("pwrite")
    spy("fsync")
    store = kit.store(tmp_path)
    store.write(IDS[:2], kit.entries(2))
    assert ("pwrite", "index.bin") not in calls
    calls.clear()
    store.flush()
    assert calls == [
        ("fsync", "shard-00000.bin"),
        ("pwrite", "index.bin"),
        ("fsync", "index.bin"),
        ("fsync", store.name),
    ]


def test_a_writer_that_ends_without_closing_loses_no_more_than_the_last_entries(kit, tmp_path):
    x = kit.entries(12)

    def work():
        store = kit.store(tmp_path)
        store.write(IDS[:6], x[:6])
        store.flush()
        store.write(IDS[6:], x[6:])

    assert kit.child(work) == 0
    store = kit.store(tmp_path)
    assert store.has(IDS).tolist() == [True] * 6 + [False] * 6


# Damage


@pytest.fixture
def written(kit, tmp_path):
    """The folder of a closed store of 12 entries."""
    store = kit.store(tmp_path)
    store.write(IDS, kit.entries(12))
    store.close()
    return store.disk.folder


@pytest.mark.parametrize("at", [0, 4 * 512 + 17, 12 * 512 - 1])
def test_a_flipped_bit_is_found_and_its_entry_never_given(kit, tmp_path, written, at):
    sample = at // kit.ENTRY
    kit.flip(written / "shard-00000.bin", at)
    assert verify_store(written) == (11, [f"{written / 'shard-00000.bin'}: activations of sample {sample}"])
    store = kit.store(tmp_path)
    with pytest.warns(
        RuntimeWarning, match=rf"shard-00000\.bin is damaged at byte .* sample {sample} are comp"
    ):
        assert store.read(IDS) is None
    others = IDS[sample != IDS]
    assert torch.equal(store.read(others), kit.entries(12)[others])
    assert not store.has(IDS[sample : sample + 1]).any()
    assert store.stats.damaged == 1
    store.write(IDS, kit.entries(12))  # it is computed again, and kept
    store.close()
    again = kit.store(tmp_path)
    assert torch.equal(again.read(IDS), kit.entries(12))
    assert again.stats.damaged == 0


def test_without_verification_bytes_are_taken_as_they_are(kit, tmp_path, written):
    kit.flip(written / "shard-00000.bin", 3)
    store = kit.store(tmp_path, verify=False)
    assert not torch.equal(store.read(IDS), kit.entries(12))


def _ahead(store, ids):
    store.prefetch(ids)
    return store.read(ids)


def test_damage_is_found_while_reading_ahead_too(kit, tmp_path, written):
    kit.flip(written / "shard-00000.bin", kit.ENTRY)
    store = kit.store(tmp_path, ram_bytes=10**6)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert _ahead(store, IDS[:3]) is None
    assert torch.equal(store.read(IDS[[0, 2]]), kit.entries(12)[[0, 2]])


def test_every_bit_of_the_index_is_covered(kit, tmp_path, written):
    index = written / "index.bin"
    for at in range(5 * 24, 6 * 24):
        kit.flip(index, at)
        assert verify_store(written) == (11, [f"{index}: 1 of 12 records"])
        store = kit.store(tmp_path)
        assert store.has(IDS).sum() == 11
        assert torch.equal(store.read(IDS[store.has(IDS)]), kit.entries(12)[store.has(IDS)])
        store.close()
        kit.flip(index, at)


def test_a_shard_cut_short_or_missing(kit, tmp_path, written):
    shard = written / "shard-00000.bin"
    os.truncate(shard, 5 * kit.ENTRY + 7)
    assert verify_store(written) == (5, [f"{shard}: activations of sample 5, 6, 7, 8, 9, 10, 11"])
    store = kit.store(tmp_path)
    assert store.has(IDS).tolist() == [True] * 5 + [False] * 7
    store.close()
    shard.unlink()
    assert verify_store(written) == (0, [f"{shard} is missing"])
    assert not kit.store(tmp_path).has(IDS).any()


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "\xff\x00", '{"format": "stackwise-activations", "version": 2}', "[" * 100_000,
     '{"format": "stackwise-activations", "version": 1, "shape": 3}'],
)  # fmt: skip
def test_a_header_that_is_none(kit, tmp_path, written, text):
    (written / "store.json").write_text(text)
    with pytest.raises(CacheError, match=r"store\.json is not the header .*stackwise cache clear"):
        Header.read(written)
    with pytest.raises(CacheError):
        kit.store(tmp_path)
    remove_store(written)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "field", ["shape", "n_samples", "draws", "per_shard", "dtype", "values", "key", "created"]
)
def test_a_header_with_a_wrong_field(written, field):
    import json

    fields = json.loads((written / "store.json").read_text())
    for wrong in (None, -1, "x", [1, 2, 3]):
        (written / "store.json").write_text(json.dumps({**fields, field: wrong}))
        if (field, wrong) == ("created", -1):
            continue
        with pytest.raises(CacheError, match="is not the header"):
            Header.read(written)


def test_a_link_in_place_of_a_shard_is_not_followed(kit, tmp_path, written):
    shard = written / "shard-00000.bin"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        kit.store(tmp_path).read(IDS)


# The disk


def test_a_full_disk_ends_the_writing_and_nothing_else(kit, tmp_path, monkeypatch):
    x = kit.entries(12)
    store = kit.store(tmp_path)
    store.write(IDS[:3], x[:3])
    original, calls = ops.pwrite, []

    def write(fd, data, offset):
        calls.append(offset)
        if len(calls) == 2:
            original(fd, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(fd, data, offset)

    monkeypatch.setattr(ops, "pwrite", write)
    with pytest.warns(RuntimeWarning, match="no space left for activations"):
        assert torch.equal(store.write(IDS[3:], x[3:]), x[3:])
    monkeypatch.undo()
    assert store.has(IDS).tolist() == [True] * 4 + [False] * 8
    assert (store.stats.dropped, store.stats.spills) == (8, 4)
    assert torch.equal(store.read(IDS[:4]), x[:4])
    store.close()
    assert store.stats.disk_bytes == kit.size(tmp_path)
    assert verify_store(store.disk.folder) == (4, [])


def test_a_failing_disk_is_an_error_with_a_way_out(kit, tmp_path, monkeypatch):
    store = kit.store(tmp_path)
    store.write(IDS[:3], kit.entries(3))

    def sync(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ops, "fsync", sync)
    with pytest.raises(CacheError, match=r"cannot write activations to .*cache_activations=false"):
        store.flush()
    assert not store.has(IDS).any(), "nobody knows whether they reached the disk"


def test_a_folder_that_cannot_be_made(kit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"Not a directory.*cache_dir"):
        kit.store(tmp_path / "file").write(IDS[:1], kit.entries(1))


# Two processes


def test_a_second_process_reads_what_is_there_and_writes_nothing(kit, tmp_path):
    x = kit.entries(12)
    first = kit.store(tmp_path)
    first.write(IDS[:4], x[:4])
    first.flush()

    def second():
        store = kit.store(tmp_path, ram_bytes=4 * kit.ENTRY)
        assert torch.equal(store.read(IDS[:4]), x[:4])
        assert torch.equal(store.write(IDS, x), x)
        assert store.stats.dropped == 5, "the memory is its own"
        assert store.stats.spills == 0
        with pytest.raises(CacheInUseError, match="being written by another process"):
            store.clear()
        store.close()

    before = kit.size(tmp_path)
    assert kit.child(second) == 0
    assert kit.size(tmp_path) == before
    first.write(IDS, x)
    assert torch.equal(first.read(IDS), x)
    first.close()
    assert verify_store(first.disk.folder) == (12, [])


def test_two_that_begin_at_once_do_not_mix(kit, tmp_path):
    x = kit.entries(12)
    first, second = kit.store(tmp_path), kit.store(tmp_path)
    first.write(IDS[:3], x[:3])
    second.write(IDS[3:6], x[3:6])
    assert second.stats.dropped == 3
    first.close()
    third = kit.store(tmp_path)
    assert third.has(IDS).sum() == 3
    third.close()
    assert verify_store(first.disk.folder) == (3, [])


def test_a_forked_child_does_not_keep_the_lock(kit, tmp_path):
    store = kit.store(tmp_path)
    store.write(IDS[:1], kit.entries(1))
    ready, go = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    store.close()
    try:
        assert FileLock(store.disk.folder / "LOCK").acquire()
    finally:
        os.write(go[1], b"x")
        os.waitpid(pid, 0)


def test_a_lock_on_a_folder_removed_meanwhile_does_not_count(kit, tmp_path, written):
    lock = FileLock(written / "LOCK")
    original = fcntl.flock
    removed = []

    def flock(fd, how):
        if not removed:  # its holder removes the store between our open and our lock
            removed.append(remove_store.__name__)
            (written / "LOCK").unlink()
            (written / "LOCK").touch()
        return original(fd, how)

    fcntl.flock = flock
    try:
        assert lock.acquire()
    finally:
        fcntl.flock = original
    other = FileLock(written / "LOCK")
    assert not other.acquire(), "the lock is on the file that is there now"
