"""When the outputs of a prefix may be stored, and the reason when they may not: one row per reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from stackwise.trunk.cached import open_prefix
from stackwise.trunk.legality import CLM, Corruption, cache_refusal
from stackwise.trunk.manager import MemoryManager

HEAD = ("tail", "norm", "head")
ALL = ("embedding", "stack:s0", "stack:s1", "stack:s2", *HEAD)


class Adapter(nn.Module):
    """As adapters sit on a layer: the layer one module further down, a set of matrices beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"trunk": nn.Linear(16, 2, bias=False)})


def with_adapter(kit, trains: bool):
    rack = kit.rack()
    attention = rack.stacks[0].blocks[0].attn
    attention.q = Adapter(attention.q).requires_grad_(False)
    attention.q.lora_A.requires_grad_(trains)
    return rack


def thawed(kit):
    rack = kit.rack()
    rack.stacks[1].blocks[0].ffn.up.requires_grad_(True)
    return rack


def dropping(kit, where):
    rack = kit.rack(dropout=0.1)
    if where == "embedding":
        rack.dropout = nn.Dropout(0.1)
    else:
        module = rack.stacks[0].blocks[1]
        (module.attn if where == "attention" else module.dropout).training = True
    return rack


def looking_back(kit):
    rack = kit.rack()
    rack.stacks[2].blocks[1].attn.reads_earlier_states = True
    return rack


def trained(kit, *units, **options):
    rack = kit.rack(**options)
    kit.train(rack, *units)
    return rack


REASONS = {
    "everything trains": (lambda kit: trained(kit, *ALL), 0, "the embedding trains"),
    "a tied head trains": (lambda kit: trained(kit, *ALL, tied=True), 0, "to which the head is tied"),
    "prepend": (lambda kit: trained(kit, "stack:s0"), 1, "stack:s0 trains, which is next to the embedding"),
    "adapters in the trunk": (lambda kit: with_adapter(kit, True), 1, "adapters train in stack:s0, the first block"),
    "a stack alone": (lambda kit: trained(kit, "stack:s2", *HEAD), 1, "one stack runs alone"),
    "a tensor in the prefix": (thawed, 5, "a tensor that trains: ffn.up.weight of stack:s1"),
    "dropout of a block": (lambda kit: dropping(kit, "residual"), 5, "not in eval mode, so its dropout is on"),
    "dropout of attention": (lambda kit: dropping(kit, "attention"), 5, "not in eval mode, so its dropout is on"),
    "dropout of the embedding": (lambda kit: dropping(kit, "embedding"), 5, "not in eval mode, so its dropout is on"),
    "states from before": (looking_back, 5, "block 5, behind the boundary, reads states from before it"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "prefix", "reason"), REASONS.values(), ids=REASONS)
def test_racks_whose_outputs_may_not_be_stored(kit, tmp_path, make, prefix, reason):
    rack = make(kit)
    assert reason in cache_refusal(rack, prefix)
    for choice in ("auto", True):
        manager = MemoryManager(10**6, tmp_path, dtype="float32")
        cached, decision = open_prefix(
            manager, rack, prefix, choice=choice, identity=kit.IDENTITY, n_samples=12, seq_len=8, visits=99
        )
        assert cached is None
        assert decision.reason.startswith("computed at every visit: ")
        assert reason in decision.reason
        assert decision.warn == (choice is True)


FRESH = Corruption("mlm", draws=None, noise=(0.15, 0.15))
DRAWN = replace(FRESH, draws=4)
HEAVY, LIGHT = (Corruption("mdm", 4, noise) for noise in ((0.5, 1.0), (0.0, 0.5)))

CORRUPTIONS = {
    "fresh draws": ({"corruption": FRESH}, "mlm corrupts a sample anew at every visit; fix .* mask_draws"),
    "other noise": (
        {"corruption": LIGHT, "written_under": HEAVY},
        "noise 0 to 0.5, the stage before it on 0.5 to 1",
    ),
    "noise after none": (
        {"corruption": LIGHT, "written_under": CLM},
        "0 to 0.5, the stage before it on none",
    ),
    "no ids": ({"has_sample_ids": False}, "no sample_ids, so a sample cannot be known again"),
}


@pytest.mark.parametrize(("options", "reason"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_data_whose_outputs_may_not_be_stored(kit, options, reason):
    import re

    assert re.search(reason, cache_refusal(kit.rack(), 5, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"corruption": DRAWN}, {"corruption": HEAVY, "written_under": HEAVY}, {"written_under": CLM}],
)
def test_what_may_be_stored(kit, options):
    assert cache_refusal(kit.rack(), 5, **options) is None


def test_frozen_adapters_dropout_in_eval_mode_and_masks_do_no_harm(kit):
    assert cache_refusal(with_adapter(kit, False), 5) is None
    assert cache_refusal(kit.rack(dropout=0.5), 5) is None
    assert cache_refusal(looking_back(kit), 7) is not None
    assert cache_refusal(trained(kit, "norm", "head"), 8) is None, "the tail may be frozen too"
    tied = kit.rack(tied=True)
    assert kit.train(tied, "stack:s2", "tail", "norm") == 5
    assert cache_refusal(tied, 5) is None, "a tied head that does not train"


def test_draws_are_entries_of_their_own_and_come_back(kit, tmp_path):
    rack = kit.rack()
    manager = MemoryManager(10**6, tmp_path, dtype="float32")
    cached, _ = open_prefix(
        manager, rack, 5, choice=True, identity=kit.IDENTITY, n_samples=12, seq_len=8, visits=99, corruption=DRAWN
    )  # fmt: skip
    example = kit.rows(0, 1, 2)
    for draw in range(4):
        corrupted = example._replace(input_ids=(example.input_ids + draw) % 23)
        wanted = kit.computed(rack, corrupted, 4)
        assert torch.equal(
            cached(corrupted._replace(draws=torch.full_like(example.sample_ids, draw))), wanted
        )
        assert torch.equal(
            cached(corrupted._replace(draws=torch.full_like(example.sample_ids, draw))), wanted
        )
    assert cached.rows_run == [12] * 4
    with pytest.raises(IndexError, match="draw 4 is outside the 4 draws"):
        cached(example._replace(draws=torch.full_like(example.sample_ids, 4)))
    other, _ = open_prefix(
        manager, rack, 5, choice=True, identity=kit.IDENTITY, n_samples=12, seq_len=8, visits=99, corruption=HEAVY
    )  # fmt: skip
    assert len(other.store) == 0, "another range of noise is another store"
