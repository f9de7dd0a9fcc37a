"""What growth and freezing promise."""

from __future__ import annotations

import copy

import pytest
import torch

from stackwise.curriculum.costs import stage_flops
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.growth import grow
from stackwise.curriculum.split import apply_training, split_of, trained_units
from stackwise.curriculum.stage import Growth, Stage
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack


def make_rack(tiny, n_stacks: int = 2, **changes) -> Rack:
    config = tiny(model__vocab_size=31, **changes)
    rack = Rack(rack_spec(config, n_stacks), seed=3)
    with torch.no_grad():  # away from the start, where norms are all ones
        for parameter in rack.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return rack


def ids(rack: Rack) -> torch.Tensor:
    return torch.randint(0, rack.spec.vocab_size, (2, 12))


@pytest.mark.parametrize(
    "options", [{}, {"model__bias": True, "model__norm": "layernorm", "model__ffn_type": "gelu"}]
)
def test_zero_growth_leaves_logits_unchanged_bit_for_bit(tiny, options):
    rack = make_rack(tiny, **options)
    tokens = ids(rack)
    before = rack(tokens)
    grown = grow(rack, Growth("append", 2, "zero"), seed=0)[0]
    assert len(grown.stacks) == 3
    assert torch.equal(grown(tokens), before)


def test_copied_stack_equals_its_source_and_random_does_not(tiny):
    rack = make_rack(tiny)
    copied = grow(rack, Growth("append", 1, "copy"), seed=0)[0]
    pairs = list(zip(copied.stacks[2].parameters(), copied.stacks[1].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)
    fresh = grow(make_rack(tiny), Growth("append", 1, "random"), seed=0)[0]
    assert not torch.equal(fresh.stacks[2].blocks[0].attn.q.weight, fresh.stacks[1].blocks[0].attn.q.weight)


def test_growth_keeps_every_older_tensor(tiny):
    rack = make_rack(tiny)
    before = copy.deepcopy(rack.state_dict())
    grown = grow(rack, Growth("append", 1, "copy"), seed=0)[0].state_dict()
    assert all(torch.equal(grown[name], tensor) for name, tensor in before.items())


def test_zero_growth_under_post_norm_is_refused(tiny):
    rack = make_rack(tiny, model__norm_placement="post")
    with pytest.raises(ValueError, match="norm_placement pre"):
        grow(rack, Growth("append", 1, "zero"), seed=0)


def test_prefix_is_derived_from_what_trains(tiny):
    rack = make_rack(tiny, n_stacks=3)
    cases = [
        (("all",), 0, 0),
        (("new", "tail", "norm", "head"), 3, 2),  # embedding and two stacks of one block
        (("stack:1", "head"), 2, 1),
        (("norm", "head"), 5, 4),
        (("embedding", "new"), 0, 0),
    ]
    for trains, prefix, prefix_blocks in cases:
        split = apply_training(rack, trained_units(rack.spec, Stage("s", 3, trains, 1)))
        assert (split.prefix, split.prefix_blocks) == (prefix, prefix_blocks), trains
        assert split == split_of(rack)


def test_prefix_saves_nothing_for_backward_and_gradients_agree_with_the_whole_graph(tiny):
    rack = make_rack(tiny, n_stacks=3)
    split = apply_training(rack, trained_units(rack.spec, Stage("s", 3, ("new", "tail", "norm", "head"), 1)))
    tokens = ids(rack)

    def gradients(prefix: int) -> list[torch.Tensor]:
        rack.zero_grad(set_to_none=True)
        rack.head(rack.forward_features(tokens, prefix=prefix)).square().mean().backward()
        return [p.grad for p in rack.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(gradients(split.prefix), gradients(0), strict=True))


@pytest.mark.parametrize("selector", ["stack:9", "heads", "new "])
def test_a_selector_that_matches_nothing_is_refused(tiny, selector):
    spec = rack_spec(tiny(model__vocab_size=31), 2)
    with pytest.raises(ValueError, match="matches nothing"):
        trained_units(spec, Stage("s", 2, (selector,), 1))


def test_tied_head_stays_with_the_embedding(tiny):
    spec = rack_spec(tiny(model__vocab_size=31, model__tie_embeddings=True), 2)
    assert "head" not in trained_units(spec, Stage("s", 2, ("new", "norm", "head"), 1))
    assert "head" in trained_units(spec, Stage("s", 2, ("all",), 1))


def test_append_curriculum_lists_one_stage_per_stack_and_the_joint_phase(tiny):
    listed = stages(tiny(model__vocab_size=31))
    assert [s.name for s in listed] == ["stack 1", "stack 2", "stack 3", "joint"]
    assert [s.n_stacks for s in listed] == [1, 2, 3, 3]
    assert "embedding" in listed[0].trains
    assert "embedding" not in listed[1].trains
    assert listed[1].grow is not None
    assert listed[0].grow is None


def test_joint_phase_takes_its_share_of_the_flops(tiny):
    config = tiny(model__vocab_size=31, training__max_steps=400)
    listed = stages(config)
    costs = stage_flops(config, listed)
    assert costs[-1] / sum(costs) == pytest.approx(0.25, abs=0.02)


def test_stage_weights_make_budgets_uneven_at_the_same_total(tiny):
    weights = [4.0, 2.0, 2.0]
    config = tiny(model__vocab_size=31, training__max_steps=40, training__progressive__stage_weights=weights)
    assert [s.steps for s in stages(config)[:3]] == [60, 30, 30]
