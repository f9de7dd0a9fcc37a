"""A cached prefix gives what running it gives, for any batch and whatever happens to be stored."""

from __future__ import annotations

import copy

import pytest
import torch

from stackwise.objectives.causal import CausalLM
from stackwise.trunk.cached import CachedPrefix, open_prefix, stack_ends
from stackwise.trunk.errors import CacheError
from stackwise.trunk.keys import IDENTITY, prefix_hash, prefix_hashes, store_key
from stackwise.trunk.manager import MemoryManager

IDS = range(12)


@pytest.fixture
def manager(tmp_path):
    made = MemoryManager(10**7, tmp_path / "cache", ram_bytes=10**6, dtype="float32")
    yield made
    made.close()


def opened(manager, kit, rack, prefix, **options):
    """The cached prefix of a stage that wants one."""
    given = {
        "choice": True,
        "identity": kit.IDENTITY,
        "n_samples": kit.SAMPLES,
        "seq_len": kit.TOKENS,
        "visits": 24,
    }
    cached, decision = open_prefix(manager, rack, prefix, **{**given, **options})
    assert cached is not None, decision.reason
    return cached


def visit(cached, kit, *ids):
    return cached(kit.rows(*ids))


# Hit = recompute


RACKS = {
    "plain": {},
    "post norm": {"norm_placement": "post"},
    "short convolutions": {"short_conv": 3, "qk_norm": True},
    "one key-value head": {"n_kv_heads": 1, "bias": True},
}
BATCHES = [
    [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)],
    [(11, 0, 5), (2,), (7, 3, 1, 10, 9, 8, 6), (4,)],
    [(3, 0), (0, 1, 2, 4), (5, 6, 7, 8, 9, 10, 11)],
]


@pytest.mark.parametrize("ram", [0, 3 * 512, 10**6], ids=["disk", "both", "memory"])
@pytest.mark.parametrize("options", RACKS.values(), ids=RACKS)
def test_what_is_read_is_what_is_computed_to_the_bit(kit, tmp_path, options, ram):
    rack = kit.rack(**options)
    whole = kit.computed(rack, kit.rows(*IDS), 4)
    for number, batches in enumerate(BATCHES):
        manager = MemoryManager(10**7, tmp_path / str(number), ram_bytes=ram, dtype="float32")
        cached = opened(manager, kit, rack, 5)
        # filled and read in different batches
        for first, second in zip(batches, BATCHES[number - 1], strict=False):
            assert torch.equal(visit(cached, kit, *first), whole[list(first)])
            assert torch.equal(visit(cached, kit, *second), whole[list(second)])
        again = [torch.randperm(12, generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
        for order in again:
            for ids in (order[:5], order[5:]):
                assert torch.equal(visit(cached, kit, *ids), whole[ids])
        assert cached.rows_run == [12] * 4, "each block ran once per sample"
        manager.close()


def test_a_sample_may_stand_twice_in_a_batch(kit, manager):
    rack = kit.rack()
    cached = opened(manager, kit, rack, 5)
    for ids in [(3, 3, 0), (0, 1, 3, 1)]:
        assert torch.equal(visit(cached, kit, *ids), kit.computed(rack, kit.rows(*ids), 4))


def test_the_loss_of_a_stage_is_the_same_with_and_without(kit, manager):
    rack = kit.rack()
    objective = CausalLM()

    def losses(prefix_of):
        model = copy.deepcopy(rack)
        seen = []
        for ids in [(0, 1, 2, 3), (4, 5, 6, 7), (0, 4, 1, 5), (3, 2, 7, 6)] * 2:
            example = kit.rows(*ids)
            context = model.make_context(
                example.input_ids, example.attention_mask, example.position_ids, example.document_ids
            )
            hidden = model.norm(model.run(prefix_of(model, example), context, 4))
            loss, weight = objective.loss(hidden, model.head, example)
            (loss / weight).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
            seen.append(loss.item())
        return seen

    cached = opened(manager, kit, rack, 5)
    plain = losses(lambda model, example: kit.computed(model, example, 4))
    assert losses(lambda model, example: cached(example)) == plain
    assert cached.rows_run == [8] * 4
    assert len(set(plain)) == 8, "it learns"


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("fp8", 5e-2)])
def test_rounded_stores_change_the_loss_a_little(kit, tmp_path, dtype, bound):
    rack = kit.rack()
    manager = MemoryManager(10**7, tmp_path, dtype=dtype)
    cached = opened(manager, kit, rack, 5)
    example = kit.rows(*IDS)
    context = rack.make_context(
        example.input_ids, example.attention_mask, example.position_ids, example.document_ids
    )

    def loss(x):
        total, weight = CausalLM().loss(rack.norm(rack.run(x, context, 4)), rack.head, example)
        return (total / weight).item()

    exact = loss(kit.computed(rack, example, 4))
    difference = abs(loss(cached(example)) - exact)
    assert 0 < difference < bound
    assert abs(loss(cached(example)) - exact) == difference


# Rounding does not depend on what is stored


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_the_same_numbers_come_out_whatever_is_stored(kit, tmp_path, dtype):
    rack = kit.rack(stacks=4)
    managers = {
        name: MemoryManager(disk, tmp_path / name, ram_bytes=ram, dtype=dtype)
        for name, disk, ram in [("room", 10**6, 10**6), ("little", 3000, 600), ("none", 0, 0)]
    }
    got = {}
    for name, manager in managers.items():
        kit.train(rack, "stack:s2", "stack:s3", "tail", "norm", "head")
        low = opened(manager, kit, rack, 5)
        for ids in [(0, 1, 2), (5, 6, 7)]:
            visit(low, kit, *ids)
        kit.train(rack, "stack:s3", "tail", "norm", "head")
        high = opened(manager, kit, rack, 7)
        first = torch.cat([visit(high, kit, *ids) for ids in [(0, 5, 8), (1, 9), (2, 3, 6)]])
        got[name] = torch.cat([first, visit(high, kit, 0, 1, 2, 3, 5, 6, 8, 9)])
        runs = {"room": [2, 2, 2, 2, 8, 8], "none": [16] * 6}.get(name)
        assert runs is None or high.rows_run == ([3, 3, 3, 3, 8, 8] if name == "room" else runs)
    assert torch.equal(got["room"], got["none"])
    assert torch.equal(got["little"], got["none"])
    exact = kit.computed(rack, kit.rows(0, 5, 8), 6)
    assert 0 < (got["none"][:3] - exact).abs().max() < 0.2


def test_outputs_in_half_precision_keep_their_dtype(kit, tmp_path):
    rack = kit.rack().bfloat16()
    for attempt in range(2):
        manager = MemoryManager(10**6, tmp_path, ram_bytes=0, dtype="bfloat16")
        cached = opened(manager, kit, rack, 5)
        x = visit(cached, kit, *IDS)
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, kit.computed(rack, kit.rows(*IDS), 4)), "bf16 values lose nothing in bf16"
        assert cached.rows_run == ([0] * 4 if attempt else [12] * 4)
        manager.close()


# The cascade


def counting(rack):
    """Count the rows on which each block is run, from now on."""
    calls, plain = [0] * len(rack.blocks()), rack.runner

    def runner(index, block, x, context, cache):
        calls[index] += x.shape[0]
        return plain(index, block, x, context, cache)

    rack.runner = runner
    return calls


def test_each_store_is_filled_from_the_one_below(kit, manager):
    rack, twin = (kit.rack(stacks=5, blocks=2) for _ in range(2))
    calls = counting(rack)
    for stage in range(1, 5):
        kit.train(rack, f"stack:s{stage}", "tail", "norm", "head")
        cached = opened(manager, kit, rack, 2 * stage + 1)
        for _ in range(2):
            for ids in torch.arange(12).split(5):
                example = kit.rows(*ids.tolist())
                assert torch.equal(cached(example), kit.computed(twin, example, 2 * stage))
        own = [2 * stage - 2, 2 * stage - 1]
        assert calls == [12 if i in own else 0 for i in range(11)], "one forward of one stack per sample"
        assert cached.rows_run == calls[: 2 * stage]
        calls[:] = [0] * 11
        assert len(manager.report()["stores"]) <= 2
    assert manager.report()["ram"]["peak"] <= 12 * kit.ENTRY, "memory moves up with the samples"


def test_rows_that_the_store_below_lacks_start_at_the_embedding(kit, manager):
    rack, twin = kit.rack(stacks=4), kit.rack(stacks=4)
    kit.train(rack, "stack:s2", "stack:s3", "tail", "norm", "head")
    visit(opened(manager, kit, rack, 5), kit, 1, 4, 6)
    kit.train(rack, "stack:s3", "tail", "norm", "head")
    cached = opened(manager, kit, rack, 7)
    for ids in [(6, 2, 1, 9), (2, 4, 0, 6)]:
        assert torch.equal(visit(cached, kit, *ids), kit.computed(twin, kit.rows(*ids), 6))
    assert cached.rows_run == [3, 3, 3, 3, 6, 6]


def test_a_store_two_below_is_gone_and_the_last_ones_are_found_again(kit, tmp_path):
    rack = kit.rack(stacks=4, blocks=1)
    manager = MemoryManager(10**7, tmp_path, ram_bytes=0, dtype="float32")
    names = []
    for stage in range(1, 4):
        kit.train(rack, f"stack:s{stage}", "tail", "norm", "head")
        cached = opened(manager, kit, rack, stage + 1)
        visit(cached, kit, *range(7))
        names.append(cached.store.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    manager.close()
    # another process takes up the last stage
    manager = MemoryManager(10**7, tmp_path, ram_bytes=0, dtype="float32")
    cached = opened(manager, kit, rack, 4)
    assert (cached.store.name, cached.below.name, cached.below_blocks) == (names[2], names[1], 2)
    assert torch.equal(visit(cached, kit, *IDS), kit.computed(rack, kit.rows(*IDS), 3))
    assert cached.rows_run == [5, 5, 5]
    manager.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_boundary_inside_a_stack_is_read_and_not_built_upon(kit, manager):
    rack = kit.rack(stacks=3)
    kit.train(rack, "block:s1.1", "stack:s2", "tail", "norm", "head")
    inside = opened(manager, kit, rack, 4)
    assert torch.equal(visit(inside, kit, 0, 1), kit.computed(rack, kit.rows(0, 1), 3))
    assert inside.below is None
    kit.train(rack, "stack:s2", "tail", "norm", "head")
    assert opened(manager, kit, rack, 5).below is None
    assert stack_ends(rack) == [2, 4, 6]


def test_a_damaged_entry_is_computed_again(kit, tmp_path):
    rack = kit.rack()
    for bad in (3, None):
        manager = MemoryManager(10**7, tmp_path, ram_bytes=0, dtype="float32")
        cached = opened(manager, kit, rack, 5)
        if bad is not None:
            visit(cached, kit, *IDS)
            manager.close()
            kit.flip(tmp_path / cached.store.name / "shard-00000.bin", bad * kit.ENTRY + 5)
            manager = MemoryManager(10**7, tmp_path, ram_bytes=0, dtype="float32")
            cached = opened(manager, kit, rack, 5)
            with pytest.warns(RuntimeWarning, match="activations of sample 3 are computed again"):
                x = visit(cached, kit, *IDS)
            assert cached.rows_run == [1] * 4
        else:
            x = visit(cached, kit, *IDS)
            assert cached.rows_run == [0] * 4
        assert torch.equal(x, kit.computed(rack, kit.rows(*IDS), 4))
        manager.close()


def test_reading_ahead_covers_both_stores(kit, tmp_path):
    rack = kit.rack(stacks=4)
    manager = MemoryManager(10**7, tmp_path, ram_bytes=40 * kit.ENTRY, dtype="float32")
    manager.ram.charge(35 * kit.ENTRY)  # what is stored goes to disk, what is read ahead has room
    kit.train(rack, "stack:s2", "stack:s3", "tail", "norm", "head")
    visit(opened(manager, kit, rack, 5), kit, 0, 1, 2)
    kit.train(rack, "stack:s3", "tail", "norm", "head")
    cached = opened(manager, kit, rack, 7)
    visit(cached, kit, 0)
    cached.prefetch(torch.tensor([0, 1, 2, 7]))
    assert manager.ram.used == 38 * kit.ENTRY
    assert torch.equal(visit(cached, kit, 0, 1, 2, 7), kit.computed(rack, kit.rows(0, 1, 2, 7), 6))
    assert manager.ram.used == 35 * kit.ENTRY


# Keys


def test_a_key_follows_every_tensor_option_and_format_of_the_prefix_and_nothing_else(kit):
    rack = kit.rack()
    before = prefix_hash(rack, 5)
    assert before == prefix_hashes(rack, 4)[-1] == prefix_hash(copy.deepcopy(rack), 5)
    assert len(set(prefix_hashes(rack, 7))) == 8
    for name, tensor in rack.state_dict().items():
        inside = name.startswith(("embedding", "stacks.s0", "stacks.s1"))
        old = tensor.flatten()[0].clone()
        tensor.flatten()[0] += 1e-3
        assert (prefix_hash(rack, 5) != before) == inside, name
        tensor.flatten()[0] = old
    assert prefix_hash(rack, 5) == before
    for change in ({"rope_theta": 500.0}, {"norm_eps": 1e-4}, {"residual_gain": 0.5}):
        assert prefix_hash(kit.rack(**change), 5) != before
    rack.stacks[0].weight_format = "bf16"
    assert prefix_hash(rack, 5) != before
    rack.stacks[0].weight_format, rack.stacks[1].compute_dtype = "fp32", "bfloat16"
    assert prefix_hash(rack, 5) != before


@pytest.mark.parametrize("name", IDENTITY)
def test_every_part_of_the_identity_makes_another_store(kit, manager, name):
    rack = kit.rack()
    visit(opened(manager, kit, rack, 5), kit, 0)
    other = opened(manager, kit, rack, 5, identity={**kit.IDENTITY, name: "y"})
    assert len(other.store) == 0
    with pytest.raises(ValueError, match=f"lacks {name}"):
        store_key("p", 4, {n: "x" for n in IDENTITY if n != name})


def test_a_trunk_that_has_changed_is_not_read(kit, manager):
    rack = kit.rack()
    visit(opened(manager, kit, rack, 5), kit, *IDS)
    with torch.no_grad():
        rack.stacks[1].blocks[1].ffn.down.weight[0, 0] += 1
    cached = opened(manager, kit, rack, 5)
    assert torch.equal(visit(cached, kit, *IDS), kit.computed(rack, kit.rows(*IDS), 4))
    assert cached.rows_run == [12] * 4


# Wrong inputs


def test_rows_without_ids_or_of_another_length_are_refused(kit, manager):
    cached = opened(manager, kit, kit.rack(), 5)
    with pytest.raises(ValueError, match="no sample_ids"):
        cached(kit.rows(0)._replace(sample_ids=None))
    with pytest.raises(ValueError, match="rows of 9 tokens, but this store holds rows of 8"):
        cached(kit.rows(0)._replace(input_ids=torch.zeros(1, 9, dtype=torch.int64)))
    with pytest.raises(IndexError, match="sample 12"):
        cached(kit.rows(0)._replace(sample_ids=torch.tensor([12])))


def test_a_foreign_store_under_the_name_is_an_error(kit, tmp_path):
    manager = MemoryManager(10**7, tmp_path, ram_bytes=0, dtype="float32")
    cached = opened(manager, kit, kit.rack(), 5)
    visit(cached, kit, 0)
    manager.close()
    header = tmp_path / cached.store.name / "store.json"
    header.write_text(header.read_text().replace('"x"', '"z"', 1))
    with pytest.raises(CacheError, match="written for another key"):
        opened(MemoryManager(10**7, tmp_path, dtype="float32"), kit, kit.rack(), 5)


def test_no_gradient_reaches_the_prefix(kit, manager):
    cached = opened(manager, kit, kit.rack(), 5)
    for _ in range(2):
        assert not visit(cached, kit, 0, 1).requires_grad


def test_a_decision_against_it_frees_what_was_stored(kit, manager):
    rack = kit.rack(stacks=4)
    kit.train(rack, "stack:s2", "stack:s3", "tail", "norm", "head")
    visit(opened(manager, kit, rack, 5), kit, *IDS)
    kit.train(rack, "embedding", "stack:s0")
    cached, decision = open_prefix(
        manager, rack, 0, choice="auto", identity=kit.IDENTITY, n_samples=12, seq_len=8, visits=24
    )
    assert cached is None
    assert "the embedding trains" in decision.reason
    assert manager.report()["stores"] == {}
    assert manager.ram.used == 0


def test_a_cached_prefix_continues_at_the_end_of_a_stack_only(kit, manager):
    cached = opened(manager, kit, kit.rack(), 5)
    with pytest.raises(AssertionError):
        CachedPrefix(cached.rack, 4, cached.store, cached.store, 1)
