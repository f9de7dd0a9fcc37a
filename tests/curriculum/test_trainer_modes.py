"""Builder and trainers on a loader of one's own, in every building mode."""

from __future__ import annotations

import copy

import pytest
import torch

from stackwise import (
    ArchitectureTrainer,
    ProgressiveRackBuilder,
    ProgressiveTrainer,
    create_rack_from_config,
    create_rack_from_specs,
)
from stackwise.config.errors import ConfigError

RESULTS = {"training_history", "joint_tuning", "final_loss", "final_rack_info", "total_training_time"}
ENTRY = {
    "stack_uid",
    "position",
    "build_index",
    "time_step",
    "mask_ratio",
    "steps",
    "loss_first",
    "loss_last",
}
COSTS = {"eval_loss", "tokens", "flops", "seconds", "trainable_params", "precision"}


def batches(n: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows that count upwards: learnable at once."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 31, (n, 4, 1), generator=generator)
    return [{"input_ids": (start + torch.arange(12)) % 31} for start in starts]


def config_of(tiny, **progressive):
    named = {f"training__progressive__{key}": value for key, value in progressive.items()}
    options = {"model__vocab_size": 31, "training__max_steps": 6, "training__optimizer__lr": 1e-2}
    return tiny(**{**options, **named})


@pytest.mark.parametrize("mode", ["append", "prepend", "grow", "independent", "cyclic"])
def test_every_mode_reaches_the_target_once(tiny, mode):
    config = config_of(tiny, building_mode=mode, joint_tuning=mode != "grow")
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    result = trainer.train_progressively(builder, batches(), 2, batches(2, seed=9))
    assert result.keys() >= {*RESULTS, "architecture", "checkpoints"}
    assert result["architecture"]["n_stacks"] == builder.n_stacks == 2
    assert all(entry.keys() >= ENTRY | COSTS for entry in result["training_history"])
    assert (result["joint_tuning"] is None) == (mode == "grow")
    first, last = result["training_history"][0], result["training_history"][-1]
    final = result["joint_tuning"] or last
    assert final["eval_loss"] < first["loss_first"]
    before = copy.deepcopy(builder.build_rack().state_dict())
    again = trainer.train_progressively(builder, batches(), 2)
    assert again["training_history"] == []
    assert again["joint_tuning"] is None
    assert all(torch.equal(before[n], t) for n, t in builder.build_rack().state_dict().items())
    with pytest.raises(ValueError, match="already has 2 stacks"):
        trainer.train_progressively(builder, batches(), 1)


def test_stacks_of_a_prepend_run_stand_in_the_order_of_building_from_the_head(tiny):
    config = config_of(tiny, building_mode="prepend")
    builder = ProgressiveRackBuilder(config)
    result = ProgressiveTrainer(config).train_progressively(builder, batches(), 3)
    assert [h["stack_uid"] for h in result["training_history"]] == ["s0", "s1", "s2"]
    assert [stack.uid for stack in builder.build_rack().stacks] == ["s2", "s1", "s0"]
    # Positions are those of the finished rack.
    assert [h["position"] for h in result["training_history"]] == [2, 1, 0]


def test_grow_goes_on_from_the_stacks_that_are_there(tiny):
    config = config_of(tiny, building_mode="grow")
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    result = ProgressiveTrainer(config).train_progressively(builder, batches(), 3)
    assert [h["n_stacks"] for h in result["training_history"]] == [1, 3]
    odd = ProgressiveRackBuilder(config)
    odd.append_stack()
    odd.append_stack()
    with pytest.raises((ValueError, ConfigError), match="1, 3 stacks, and the rack has 2"):
        ProgressiveTrainer(config).train_progressively(odd, batches(), 3)


def test_mixed_growth_keeps_identities_and_freezes_all_but_the_newest(tiny):
    builder = ProgressiveRackBuilder(config_of(tiny))
    first, second = builder.append_stack(), builder.append_stack()
    third = builder.prepend_stack()
    rack = builder.build_rack()
    assert list(rack.stacks) == [third, first, second]
    pairs = zip(third.parameters(), first.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # a copy of its neighbour
    assert builder.freeze_trunk() == [1, 2]
    assert not first.training
    assert not second.training
    last = builder.append_stack()
    assert builder.freeze_trunk() == [0, 1, 2]
    assert all(p.requires_grad for p in last.parameters())
    assert not any(p.requires_grad for p in third.parameters())


def test_hand_written_stages_run_on_a_builder(tiny):
    stages = [
        {"train": ["all"], "max_steps": 2},
        {"train": ["new"], "max_steps": 2, "grow": {"op": "prepend", "init": "zero"}},
        {"train": ["stack:1"], "max_steps": 1, "optimizer_state": "carry"},
    ]
    config = tiny(model__vocab_size=31, training__stages=stages)
    builder = ProgressiveRackBuilder(config)
    result = ProgressiveTrainer(config).train_progressively(builder, batches())
    assert [h["stack_uid"] for h in result["training_history"]] == ["s0", "s1", "s0"]
    assert [h["steps"] for h in result["training_history"]] == [2, 2, 1]


@pytest.mark.parametrize(("unit", "count"), [("block", 4), ("stack", 2), ("rack", 1)])
def test_every_unit_lowers_the_loss_of_a_two_by_two_rack(tiny, unit, count):
    config = tiny(
        model__vocab_size=31,
        model__architecture__n_stacks=2,
        model__architecture__blocks_per_stack=2,
        training__max_steps=8,
        training__unit=unit,
        training__optimizer__lr=1e-2,
    )
    rack = create_rack_from_config(config)
    result = ArchitectureTrainer(config).train_architecture(rack, batches(), batches(2, seed=9))
    history = result["training_history"]
    assert len(history) == count
    losses = [history[0]["loss_first"], *(entry["eval_loss"] for entry in history)]
    assert losses == sorted(losses, reverse=True)
    assert result["architecture"] == {
        "n_stacks": 2,
        "blocks_per_stack": [2, 2],
        "total_blocks": len(rack.spec.blocks),
        "params": rack.get_parameter_count(),
        "trainable": rack.get_trainable_parameter_count(),
    }


def test_a_rack_of_unlike_stacks_trains_by_unit(tiny):
    config = tiny(model__vocab_size=31, training__unit="block", training__max_steps=1)
    blocks = {"n_heads": 2, "d_ff": 24, "causal": True}
    specs = [
        {"stack_id": 5, "n_blocks": 2, "block_spec": blocks},
        {"stack_id": 1, "n_blocks": 1, "block_spec": {**blocks, "d_ff": 48}},
    ]
    rack = create_rack_from_specs(31, 16, specs, tie_embeddings=False)
    result = ArchitectureTrainer(config).train_architecture(rack, batches())
    assert [h["name"] for h in result["training_history"]] == [
        "stack 1, block 1",
        "stack 2, block 1",
        "stack 2, block 2",
    ]
