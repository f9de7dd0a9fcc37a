"""The activation store: what goes in comes out, within its budgets, and never what was not written."""

from __future__ import annotations

import warnings

import pytest
import torch

from stackwise.trunk.budget import Budget
from stackwise.trunk.errors import CacheError
from stackwise.trunk.layout import RECORD
from stackwise.trunk.listing import verify_store

IDS = torch.tensor([3, 0, 7, 11])


@pytest.mark.parametrize("ram", [0, 10**6], ids=["disk", "memory"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("bfloat16", 2**-8), ("fp8", 2**-4)])
def test_what_is_written_is_read_again_in_any_order(kit, tmp_path, dtype, bound, ram):
    store = kit.store(tmp_path, dtype=dtype, ram_bytes=ram)
    x = 100 * kit.entries(4)
    rounded = store.write(IDS, x)
    assert (rounded - x).abs().max() <= bound * x.abs().max()
    # fp8 keeps 4 significant bits beside a scale per token: the error is relative to the number or to the smallest step
    step = x.abs().amax(-1, keepdim=True) / 448 * 2**-9
    assert ((rounded - x).abs() <= bound * x.abs() + (step if dtype == "fp8" else 0)).all()
    for order in (IDS, IDS.flip(0), IDS[:1], IDS[[2, 2, 0]]):
        wanted = torch.stack([rounded[IDS.tolist().index(i)] for i in order.tolist()])
        assert torch.equal(store.read(order), wanted)
    assert (store.stats.ram_bytes > 0) == bool(ram)
    store.close()


def test_a_token_of_zeros_and_tokens_of_other_sizes_survive_fp8(kit, tmp_path):
    x = kit.entries(1) * torch.logspace(-30, 30, kit.TOKENS).unsqueeze(-1)
    x[0, 3] = 0
    got = kit.store(tmp_path, dtype="fp8").write(IDS[:1], x)
    assert torch.equal(got[0, 3], x[0, 3])
    kept = x.abs() > x.abs().amax(-1, keepdim=True) / 64
    assert ((got - x).abs() <= 2**-4 * x.abs())[kept].all()


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_that_was_written_comes_back_also_from_another_process(kit, tmp_path, values):
    x = kit.entries(4).to(values)
    with_store = kit.store(tmp_path)
    assert torch.equal(with_store.write(IDS, x), x)
    with_store.close()
    again = kit.store(tmp_path).read(IDS)
    assert again.dtype == values
    assert torch.equal(again, x)


def test_has_and_read_tell_what_is_missing(kit, tmp_path):
    store = kit.store(tmp_path, draws=2)
    store.write(IDS, kit.entries(4), draw=1)
    assert store.has(torch.tensor([7, 8, 3]), draw=1).tolist() == [True, False, True]
    assert not store.has(IDS).any(), "another draw is another entry"
    assert store.read(torch.tensor([7, 8, 3]), draw=1) is None
    assert store.read(torch.tensor([7, 3]), draw=1) is not None
    assert (store.stats.hits, store.stats.misses, store.stats.entries, len(store)) == (2, 1, 4, 4)


def test_an_entry_is_written_once(kit, tmp_path):
    store = kit.store(tmp_path)
    x = kit.entries(2)
    store.write(torch.tensor([5, 5]), torch.cat((x[:1], x[:1])))
    before = store.stats.disk_bytes
    store.write(torch.tensor([5]), x[1:])
    assert torch.equal(store.read(torch.tensor([5])), x[:1])
    assert store.stats.disk_bytes == before


def test_memory_is_filled_first_then_the_disk_then_nothing(kit, tmp_path):
    size = kit.ENTRY
    header = 400
    store = kit.store(tmp_path, ram_bytes=4 * size, disk_bytes=4 * (size + RECORD.size) + header)
    x = kit.entries(kit.SAMPLES)
    for i in range(kit.SAMPLES):
        store.write(torch.tensor([i]), x[i : i + 1])
        assert store.stats.ram_bytes <= 4 * size
        assert store.ram.used == store.stats.ram_bytes
    stats = store.stats
    in_ram = stats.ram_bytes // size
    assert in_ram == 3, "an eighth is left for reading ahead"
    assert stats.spills == 4
    assert stats.dropped == kit.SAMPLES - in_ram - 4
    assert store.has(torch.arange(kit.SAMPLES)).tolist() == [True] * 7 + [False] * 5
    assert torch.equal(store.read(torch.arange(7)), x[:7])
    store.flush()
    assert store.stats.disk_bytes == kit.size(tmp_path)


def test_bytes_on_disk_are_those_of_its_files(kit, tmp_path):
    store = kit.store(tmp_path, dtype="bfloat16")
    for count in (1, 2, 3):
        store.write(torch.arange(count), kit.entries(count))
        store.flush()
        assert store.stats.disk_bytes == store.disk.budget.used == kit.size(tmp_path)
    store.close()
    again = kit.store(tmp_path, dtype="bfloat16")
    assert again.stats.disk_bytes == again.disk.budget.used == kit.size(tmp_path)
    again.clear()
    assert again.disk.budget.used == 0
    assert list(tmp_path.iterdir()) == []


def test_a_budget_of_a_megabyte_spills_and_is_kept(tmp_path, kit):
    store = kit.store(tmp_path, shape=(64, 128), n_samples=100, ram_bytes=10**6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, 128, generator=generator)
    for ids in torch.arange(100).split(5):
        store.write(ids, x[ids])
    assert x.nbytes > 3 * 10**6
    for epoch in range(2):
        order = torch.randperm(100, generator=generator)
        for now, then in zip(order.split(5), [*order.split(5)[1:], order[:0]], strict=True):
            if epoch:
                store.prefetch(then)
            assert torch.equal(store.read(now), x[now])
            assert store.stats.ram_bytes == store.ram.used <= 10**6
    assert store.ram.peak <= 10**6
    assert store.stats.spills == 100 - int(10**6 * 7 / 8) // (64 * 128 * 4)
    store.close()
    assert store.ram.used == 0


def test_a_store_ten_times_the_memory_streams_from_several_shards(tmp_path, kit, monkeypatch):
    monkeypatch.setattr("stackwise.trunk.layout.SHARD_BYTES", 5000)
    monkeypatch.setattr("stackwise.trunk.disk._OPEN_SHARDS", 2)
    size = kit.ENTRY
    store = kit.store(tmp_path, n_samples=60, ram_bytes=6 * size)
    x = kit.entries(60)
    for ids in torch.arange(60).split(4):
        store.write(ids, x[ids])
        assert torch.equal(store.read(ids), x[ids]), "while it grows"
    for ids in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(4):
        store.prefetch(ids)
        assert torch.equal(store.read(ids), x[ids])
    assert store.ram.peak <= 6 * size
    store.close()
    assert len(list(tmp_path.glob("*/shard-*.bin"))) == -(-55 // (5000 // size))
    assert torch.equal(kit.store(tmp_path, n_samples=60).read(torch.arange(5, 60)), x[5:])


# Reading ahead


def test_what_was_read_ahead_is_what_read_gives(kit, tmp_path):
    size = kit.ENTRY
    store = kit.store(tmp_path, ram_bytes=40 * size)
    x = kit.entries(kit.SAMPLES)
    store.ram.charge(35 * size)  # as another store would
    store.write(torch.arange(kit.SAMPLES), x)
    assert store.stats.spills == kit.SAMPLES
    reads = []
    get = store.disk.get
    store.disk.get = lambda entry, out: reads.append(entry) or get(entry, out)
    store.prefetch(torch.tensor([1, 2, 3, 2]))
    assert torch.equal(store.read(torch.tensor([2, 1])), x[[2, 1]])
    assert sorted(reads) == [1, 2, 3], "each was read once, in the background"
    assert store.ram.used == 38 * size
    assert torch.equal(store.read(torch.tensor([3])), x[3:4])
    assert (reads, store.ram.used) == ([1, 2, 3], 35 * size), "freed when nothing of it is left"
    store.prefetch(torch.arange(6))
    assert torch.equal(store.read(torch.tensor([9])), x[9:10])
    assert store.ram.used == 35 * size, "six rows would not fit, and nothing is read ahead then"


def test_errors_of_reading_ahead_come_with_the_read(kit, tmp_path):
    store = kit.store(tmp_path, ram_bytes=10**5)
    store.ram.charge(9 * 10**4)
    store.write(IDS, kit.entries(4))

    def broken(entry, out):
        raise OSError("the disk is gone")

    store.disk.get = broken
    store.prefetch(IDS)
    with pytest.raises(OSError, match="the disk is gone"):
        store.read(IDS)


def test_discard_frees_memory_and_keeps_the_disk(kit, tmp_path):
    size = kit.ENTRY
    store = kit.store(tmp_path, ram_bytes=3 * size)
    x = kit.entries(4)
    store.write(IDS, x)
    store.discard(IDS)
    assert store.ram.used == 0
    assert store.has(IDS).tolist() == [False, False, True, True]
    assert torch.equal(store.read(IDS[2:]), x[2:])


# Keys


@pytest.mark.parametrize(
    "other",
    [{"key": {"boundary": 2, "prefix": "q"}}, {"dtype": "bfloat16"}, {"draws": 2}, {"n_samples": 13}, {"shape": (4, 32)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_store_of_another_key_is_not_read(kit, tmp_path, other):
    store = kit.store(tmp_path)
    store.write(IDS, kit.entries(4))
    store.close()
    assert not kit.store(tmp_path, **other).has(IDS).any()
    assert kit.store(tmp_path).has(IDS).all()


def test_a_folder_put_under_another_name_is_refused(kit, tmp_path):
    store = kit.store(tmp_path)
    store.write(IDS, kit.entries(4))
    store.close()
    other = kit.store(tmp_path, key={"boundary": 2, "prefix": "q"})
    store.disk.folder.rename(tmp_path / other.name)
    with pytest.raises(CacheError, match=r"written for another key .*'prefix': 'p'.*stackwise cache clear"):
        kit.store(tmp_path, key={"boundary": 2, "prefix": "q"})
    store = kit.store(tmp_path)  # the lock of the refused one is free again
    assert not store.has(IDS).any()


# Wrong inputs


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"dtype": "float16"}, ValueError, "dtype is 'float16', allowed: float32, bfloat16, fp8"),
        ({"shape": (0, 4)}, ValueError, "at least one token"),
        ({"n_samples": 0}, ValueError, "n_samples and draws are at least 1"),
        ({"ram_bytes": -1}, ValueError, "a budget is 0 bytes or more, got -1"),
    ],
)
def test_a_store_that_cannot_be(kit, tmp_path, change, error, says):
    with pytest.raises(error, match=says):
        kit.store(tmp_path, **change)


def test_wrong_shapes_dtypes_and_ids_are_refused_and_change_nothing(kit, tmp_path):
    store = kit.store(tmp_path)
    x = kit.entries(4)
    store.write(IDS[:1], x[:1])
    with pytest.raises(ValueError, match=r"4 entries of \[8, 16\] expected, got \[4, 7, 16\]"):
        store.write(IDS, x[:, 1:])
    with pytest.raises(ValueError, match=r"4 entries of \[8, 16\] expected, got \[3, 8, 16\]"):
        store.write(IDS, x[1:])
    with pytest.raises(TypeError, match=r"floating-point numbers, got torch\.int64"):
        store.write(IDS, x.long())
    with pytest.raises(TypeError, match=r"entries of this store are torch\.float32, got torch\.bfloat16"):
        store.write(IDS, x.bfloat16())
    for wrong in (torch.tensor([0.0]), torch.tensor([[1]]), torch.tensor([True])):
        with pytest.raises(TypeError, match=r"sample ids are integers \[B\]"):
            store.has(wrong)
    for bad in (-1, 12):
        with pytest.raises(IndexError, match=f"sample {bad} is outside a data set of 12"):
            store.read(torch.tensor([0, bad]))
    with pytest.raises(IndexError, match="draw 1 is outside the 1 draws"):
        store.has(IDS, draw=1)
    assert len(store) == 1


def test_budgets_count_and_ask_for_room():
    asked = []
    budget = Budget(10, 4, lambda count: asked.append(count) or budget.give(min(count, 2)))
    assert budget.take(6)
    assert not asked
    assert budget.take(1)
    assert asked == [1]
    assert not budget.take(9)
    assert (budget.used, budget.peak) == (8, 10)


def test_a_store_in_memory_leaves_no_trace(kit, tmp_path):
    store = kit.store(tmp_path / "cache", ram_bytes=10**6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.write(IDS, kit.entries(4))
        store.flush()
        store.close()
    assert not (tmp_path / "cache").exists()


def test_verify_reads_every_entry(kit, tmp_path):
    store = kit.store(tmp_path)
    store.write(IDS, kit.entries(4))
    store.close()
    assert verify_store(store.disk.folder) == (4, [])
