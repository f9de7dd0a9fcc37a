"""Stores of a folder under one budget: the oldest make room, those in use never do."""

from __future__ import annotations

import os

import pytest
import torch

from stackwise.storage.lock import FileLock
from stackwise.trunk.listing import list_stores
from stackwise.trunk.manager import MemoryManager, free_bytes
from stackwise.trunk.settings import TrunkKeys

IDS = torch.arange(12)


def open_store(manager, kit, name, boundary=2):
    return manager.open({"boundary": boundary, "prefix": name}, (kit.TOKENS, kit.WIDTH), kit.SAMPLES)


def fill(kit, folder, name, used):
    """A closed store of twelve entries, last used at a moment."""
    manager = MemoryManager(10**9, folder, ram_bytes=0, dtype="float32")
    store = open_store(manager, kit, name)
    store.write(IDS, kit.entries(12))
    manager.close()
    os.utime(store.disk.folder / "store.json", (used, used))
    return store.name


def test_the_oldest_stores_make_room(kit, tmp_path):
    names = [fill(kit, tmp_path, name, used) for name, used in [("a", 300), ("b", 100), ("c", 200)]]
    one = kit.size(tmp_path) // 3
    assert [info.name for info in list_stores(tmp_path)] == [names[1], names[2], names[0]]
    manager = MemoryManager(3 * one + 300, tmp_path, ram_bytes=0, dtype="float32")
    assert manager.disk.used == kit.size(tmp_path)
    store = open_store(manager, kit, "d")
    store.write(IDS, kit.entries(12))
    store.flush()
    assert {info.name for info in list_stores(tmp_path)} == {names[0], names[2], store.name}
    assert manager.report()["evicted"] == 1
    assert kit.size(tmp_path) == manager.disk.used <= manager.disk.limit
    assert store.stats.dropped == 0


def test_stores_in_use_are_not_removed(kit, tmp_path):
    for name, used in [("a", 1), ("b", 2), ("c", 3)]:
        fill(kit, tmp_path, name, used)
    one = kit.size(tmp_path) // 3
    manager = MemoryManager(3 * one + 300, tmp_path, ram_bytes=0, dtype="float32")
    own = open_store(manager, kit, "a")
    theirs = FileLock(next(info.path for info in list_stores(tmp_path) if info.used == 2) / "LOCK")
    assert theirs.acquire()
    open_store(manager, kit, "d").write(IDS, kit.entries(12))
    left = {info.name for info in list_stores(tmp_path)}
    assert own.name in left
    assert theirs.path.parent.name in left
    assert len(left) == 3
    theirs.release()


def test_budgets_are_common_to_all_stores(kit, tmp_path):
    manager = MemoryManager(5000, tmp_path, ram_bytes=8 * kit.ENTRY, dtype="float32")
    first, second = open_store(manager, kit, "a"), open_store(manager, kit, "b")
    first.write(IDS, kit.entries(12))
    second.write(IDS, kit.entries(12, seed=1))
    assert torch.equal(first.read(IDS), kit.entries(12))
    assert (first.stats.spills, first.stats.dropped) == (5, 0)
    assert (second.stats.spills, second.stats.dropped) == (3, 9)
    report = manager.report()
    assert report["ram"] == {"limit": 8 * kit.ENTRY, "used": 7 * kit.ENTRY, "peak": 7 * kit.ENTRY}
    assert (report["spills"], report["dropped"], report["hits"]) == (8, 9, 12)
    for store in (first, second):
        store.flush()
    assert report["disk"]["used"] == kit.size(tmp_path) <= 5000
    manager.keep_only(second)
    assert manager.ram.used == 0
    assert manager.disk.used == kit.size(tmp_path)
    assert manager.report()["spills"] == 8, "what is gone still counts"
    manager.close()
    assert manager.disk.used == kit.size(tmp_path) > 0


def test_a_store_taken_up_again_counts_once(kit, tmp_path):
    fill(kit, tmp_path, "a", 1)
    manager = MemoryManager(10**6, tmp_path, ram_bytes=0, dtype="float32")
    store = open_store(manager, kit, "a")
    assert manager.disk.used == kit.size(tmp_path)
    assert torch.equal(store.read(IDS), kit.entries(12))
    manager.close(remove=True)
    assert manager.disk.used == 0


def test_without_a_limit_it_is_80_percent_of_what_could_be_free(kit, tmp_path, monkeypatch):
    fill(kit, tmp_path, "a", 1)
    monkeypatch.setattr("stackwise.trunk.manager.free_bytes", lambda path: 1000)
    manager = MemoryManager(None, tmp_path)
    assert manager.disk.limit == int(0.8 * (1000 + kit.size(tmp_path)))


def test_free_space_of_a_folder_yet_to_be_made(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_the_manager_does_as_the_keys_say(kit, tmp_path):
    keys = TrunkKeys(
        cache_dir=str(tmp_path / "here"),
        cache_max_bytes=10**6,
        cache_ram_bytes=2 * kit.ENTRY,
        cache_dtype="fp8",
    )
    manager = MemoryManager.of(keys)
    store = open_store(manager, kit, "a")
    store.write(IDS, kit.entries(12))
    assert manager.disk.limit == 10**6
    assert manager.ram.limit == 2 * kit.ENTRY
    assert store.codec.entry_bytes == kit.TOKENS * kit.WIDTH + 4 * kit.TOKENS
    assert (tmp_path / "here" / store.name / "store.json").exists()


def test_folders_of_other_kinds_are_left_alone(kit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("keep")
    (tmp_path / "file").write_text("keep")
    name = fill(kit, tmp_path, "a", 1)
    (tmp_path / "link").symlink_to(tmp_path / name)
    assert [info.name for info in list_stores(tmp_path)] == [name]
    manager = MemoryManager(300, tmp_path, ram_bytes=0, dtype="float32")
    open_store(manager, kit, "b").write(IDS[:1], kit.entries(1))
    assert not (tmp_path / name).exists(), "it had to make room"
    assert (tmp_path / "mine" / "text").read_text() == "keep"
    assert list_stores(tmp_path / "nowhere") == []


def test_removing_leaves_files_of_others(kit, tmp_path):
    manager = MemoryManager(10**6, tmp_path, ram_bytes=0, dtype="float32")
    store = open_store(manager, kit, "a")
    store.write(IDS, kit.entries(12))
    (store.disk.folder / "notes.txt").write_text("keep")
    manager.close(remove=True)
    assert [path.name for path in store.disk.folder.iterdir()] == ["notes.txt"]
    assert manager.disk.used == 0


def test_find_gives_only_what_holds_something(kit, tmp_path):
    manager = MemoryManager(10**6, tmp_path, dtype="float32")
    where = ({"boundary": 2, "prefix": "a"}, (kit.TOKENS, kit.WIDTH), kit.SAMPLES)
    assert manager.find(*where) is None
    store = manager.open(*where)
    assert manager.find(*where) is None
    store.write(IDS[:1], kit.entries(1))
    assert manager.find(*where) is store


@pytest.mark.parametrize("limit", [-1, -(10**9)])
def test_a_negative_limit_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match=f"a budget is 0 bytes or more, got {limit}"):
        MemoryManager(limit, tmp_path)
