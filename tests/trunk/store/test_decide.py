"""auto stores where that pays and fits, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stackwise.data.loader import permutation
from stackwise.model.block_spec import BlockSpec
from stackwise.model.flops import block_forward_flops
from stackwise.trunk.cached import open_prefix
from stackwise.trunk.decide import NOMINAL, Rates, Room, Work, decide, overlap, store_seconds
from stackwise.trunk.layout import entry_bytes
from stackwise.trunk.manager import MemoryManager

WORK = Work(samples=1000, visits=3000, entry_bytes=10**6, prefix_flops=4e9, fill_flops=1e9)
ROOM = Room(ram=10**9, disk=10**10)
RATES = Rates(flops=1e10, ram=1e9, disk=1e8)


def test_the_prediction_follows_the_formula():
    given = decide("auto", None, WORK, ROOM, RATES)
    assert given.predicted_bytes == 10**9
    assert given.recompute_seconds == pytest.approx(3000 * 0.4)
    assert given.store_seconds == pytest.approx(1000 * 0.4 + 3000 * 1e6 / 1e9)
    half = replace(WORK, below=0.5)
    # of 1000 fills 500 run only what lies above the boundary below, and read it: 3500 entries are moved
    assert store_seconds(half, ROOM, RATES) == pytest.approx(500 * 0.1 + 500 * 0.4 + 3.5)
    little = Room(ram=25 * 10**7, disk=10**10)
    assert store_seconds(WORK, little, RATES) == pytest.approx(400 + 3000 * (0.25 * 1e-3 + 0.75 * 1e-2))


CASES = {
    "samples come again": ("auto", None, WORK, ROOM, True, r"^stored: 1 GB; each sample comes 3 times; about 403 s"),
    "one pass": ("auto", None, replace(WORK, visits=1000), ROOM, False, "comes once and no later stage"),
    "one pass, then another stage": (
        "auto", None, replace(WORK, visits=1000, later=1.0), ROOM, True, "a later stage goes on from here"),
    "one pass over a stored boundary": (
        "auto", None, replace(WORK, visits=1000, below=1.0), ROOM, True, "the boundary below is stored"),
    "cheap blocks": (
        "auto", None, replace(WORK, prefix_flops=1e6, fill_flops=1e6), ROOM, False, "about 0.3 s, and storing .* 3.1 s"),
    "no room": ("auto", None, WORK, Room(10**8, 10**8), False, "would take 1 GB and there is room for 200 MB"),
    "most is there already": ("auto", None, WORK, Room(10**8, 10**8, held=900), True, "each sample comes 3 times"),
    "asked for without room": (True, None, WORK, Room(10**8, 10**8), True, "room for 200 MB, the rest is computed"),
    "asked for without gain": (True, None, replace(WORK, visits=1000), ROOM, True, "cache_activations is true, 1 GB"),
    "asked for and not allowed": (True, "adapters train", WORK, ROOM, False, "^computed at every visit: adapters train"),
    "not allowed": ("auto", "adapters train", WORK, ROOM, False, "adapters train"),
    "not wanted": (False, None, WORK, ROOM, False, "cache_activations is false"),
}  # fmt: skip


@pytest.mark.parametrize(("choice", "refusal", "work", "room", "use", "says"), CASES.values(), ids=CASES)
def test_decisions(choice, refusal, work, room, use, says):
    import re

    decision = decide(choice, refusal, work, room, RATES)
    assert decision.use == use
    assert re.search(says, decision.reason)
    assert decision.warn == (choice is True and not use)


def test_what_a_later_stage_saves_counts():
    even = replace(WORK, visits=1000, prefix_flops=5e6, fill_flops=5e6)
    assert not decide("auto", None, even, ROOM, RATES).use
    assert not decide("auto", None, replace(even, later=1.0), ROOM, RATES).use
    dear = replace(even, prefix_flops=3e7, fill_flops=3e7, later=1.0)
    assert decide("auto", None, dear, ROOM, RATES).use


def test_a_wide_trunk_is_dearer_to_run_than_to_read(kit):
    """The billion-token figures of a 70B shape: 16.4 TB in bf16, 8.2 TB in fp8, which no disk here holds."""
    for dtype, terabytes in (("bfloat16", 16.4), ("fp8", 8.2)):
        size = entry_bytes((4096, 8192), dtype) * (10**9 / 4096)
        assert size / 1e12 == pytest.approx(terabytes, rel=1e-2)
    block = BlockSpec(8192, 64, n_kv_heads=8, d_ff=28672, causal=True)
    flops = block_forward_flops(block, 4096) * 4096 * 4
    work = Work(1000, 1000, entry_bytes((4096, 8192), "bfloat16"), flops, flops, later=1.0)
    assert decide("auto", None, work, Room(0, 10**12), NOMINAL["cuda"]).use
    assert "room for 10 GB" in decide("auto", None, work, Room(0, 10**10), NOMINAL["cuda"]).reason


def test_open_prefix_decides_by_the_stage(kit, tmp_path):
    rack = kit.rack(stacks=4, blocks=1)
    kit.train(rack, "stack:s2", "stack:s3", "tail", "norm", "head")
    manager = MemoryManager(10**6, tmp_path, dtype="float32")
    given = {"identity": kit.IDENTITY, "n_samples": 12, "seq_len": 8}
    slow = Rates(1e3, 1e9, 1e9)
    once = open_prefix(manager, rack, 3, choice="auto", visits=12, rates=slow, **given)
    assert once[0] is None
    assert "comes once" in once[1].reason
    cached, decision = open_prefix(manager, rack, 3, choice="auto", visits=12, later=1.0, rates=slow, **given)
    assert decision.use
    assert decision.predicted_bytes == 12 * kit.ENTRY
    flops = sum(block_forward_flops(block, 8) * 8 for block in rack.spec.blocks[:2])
    assert decision.recompute_seconds == pytest.approx(12 * flops / 1e3)
    for i in range(0, 12, 4):
        cached(kit.rows(*range(i, i + 4)))
    kit.train(rack, "stack:s3", "tail", "norm", "head")
    unplanned = open_prefix(manager, rack, 4, choice="auto", visits=12, rates=slow, **given)
    assert unplanned[0] is None, "what happens to be stored does not decide"
    built_on, decision = open_prefix(
        manager, rack, 4, choice="auto", visits=12, follows=1.0, rates=slow, **given
    )
    assert "the boundary below is stored" in decision.reason
    assert decision.store_seconds == pytest.approx(12 * flops / 2 / 1e3, rel=1e-3)
    assert built_on.below is cached.store
    empty = MemoryManager(10**6, tmp_path / "empty", dtype="float32")
    lost = open_prefix(empty, rack, 4, choice="auto", visits=12, follows=1.0, rates=slow, **given)
    assert lost[0].below is None
    assert lost[1] == decision, "a run that lost the stored boundary with its process decides as before"
    kept, decision = open_prefix(manager, rack, 4, choice="auto", visits=12, begun=True, **given)
    assert kept is not None
    assert decision.reason == "stored, as when the stage began"
    assert open_prefix(manager, rack, 4, choice=True, visits=12, begun=False, **given)[0] is None
    fast = open_prefix(manager, rack, 4, choice="auto", visits=24, rates=Rates(1e15, 1e3, 1e3), **given)
    assert fast[0] is None
    no_ids = open_prefix(manager, rack, 4, choice=True, visits=24, **{**given, "n_samples": None})
    assert no_ids[0] is None
    assert no_ids[1].warn


def test_shares_of_samples_that_two_stages_have_in_common():
    def simulated(first, second, n, shuffled):
        total = 0.0
        for seed in range(400):
            orders = [permutation(n, seed, e) if shuffled else range(n) for e in range(8)]
            seen = {int(orders[at // n][at % n]) for at in range(*first)}
            ids = [int(orders[at // n][at % n]) for at in range(*second)]
            total += sum(i in seen for i in ids) / len(ids)
        return total / 400

    for first, second in [
        ((0, 10), (0, 10)), ((0, 10), (10, 20)), ((0, 20), (20, 25)), ((5, 15), (15, 35)), ((0, 7), (3, 12)),
        ((0, 30), (30, 40)), ((13, 27), (44, 60)),
    ]:  # fmt: skip
        for shuffled in (True, False):
            expected = overlap(first, second, 20, shuffled=shuffled)
            assert expected == pytest.approx(simulated(first, second, 20, shuffled), abs=0.04), (
                first,
                second,
            )
