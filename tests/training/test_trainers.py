"""Builder and trainer on data loaders of one's own."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch

from stackwise import CheckpointError, ConfigError, ProgressiveRackBuilder, ProgressiveTrainer


def batches(n: int = 6, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows that count upwards: learnable at once."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 31, (n, 4, 1), generator=generator)
    return [{"input_ids": (start + torch.arange(12)) % 31} for start in starts]


def config_of(tiny, **changes):
    return tiny(model__vocab_size=31, training__max_steps=12, training__optimizer__lr=1e-2, **changes)


def test_training_progressively_grows_learns_and_keeps_the_trunk(tiny):
    config = config_of(tiny)
    builder = ProgressiveRackBuilder(config)
    result = ProgressiveTrainer(config).train_progressively(builder, batches(), 3, batches(2, seed=9))
    assert [h["stack_uid"] for h in result["training_history"]] == ["s0", "s1", "s2"]
    assert [h["position"] for h in result["training_history"]] == [0, 1, 2]
    losses = [h["eval_loss"] for h in result["training_history"]]
    assert losses[2] < losses[0]
    assert result["joint_tuning"]["name"] == "joint"
    assert result["final_rack_info"]["current_stacks"] == 3
    assert result["architecture"]["n_stacks"] == 3
    keys = {
        "steps",
        "loss_first",
        "loss_last",
        "tokens",
        "flops",
        "seconds",
        "trainable_params",
        "build_index",
    }
    assert keys <= result["training_history"][0].keys()


@pytest.mark.parametrize(
    ("mode", "steps", "ratios"),
    [("prepend", [0, 50, 100], [1 / 6, 3 / 6, 5 / 6]), ("append", [100, 50, 0], [5 / 6, 3 / 6, 1 / 6])],
)
def test_the_history_tells_the_noise_of_every_stack(tiny, mode, steps, ratios):
    keys = {
        "training_objective": "diffusion",
        "building_mode": mode,
        "time_interpretation": "depth",
        "time_per_stack": 50,
        "joint_tuning": False,
    }
    config = config_of(
        tiny,
        model__attention_preset="bert_style",
        objective__mask_token_id=30,
        evaluation__passes=1,
        **{f"training__progressive__{key}": value for key, value in keys.items()},
    )
    config.training.max_steps = 1
    builder = ProgressiveRackBuilder(config)
    result = ProgressiveTrainer(config).train_progressively(builder, batches(2), 3)
    assert [h["time_step"] for h in result["training_history"]] == steps
    assert [h["mask_ratio"] for h in result["training_history"]] == pytest.approx(ratios)


def test_a_second_call_with_the_same_target_adds_nothing(tiny):
    config = config_of(tiny)
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    trainer.train_progressively(builder, batches(), 2)
    before = copy.deepcopy(builder.build_rack().state_dict())
    again = trainer.train_progressively(builder, batches(), 2)
    assert again["training_history"] == []
    assert all(torch.equal(before[n], t) for n, t in builder.build_rack().state_dict().items())
    more = trainer.train_progressively(builder, batches(), 3)
    assert [h["stack_uid"] for h in more["training_history"]] == ["s2"]
    with pytest.raises(ValueError, match="already has 3 stacks"):
        trainer.train_progressively(builder, batches(), 2)


def test_stacks_already_there_are_trained_first_in_build_order(tiny):
    config = config_of(tiny)
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    builder.append_stack()
    result = ProgressiveTrainer(config).train_progressively(builder, batches(), 3)
    assert [h["stack_uid"] for h in result["training_history"]] == ["s0", "s1", "s2"]


def test_train_rack_without_a_target_tunes_everything(tiny):
    config = config_of(tiny)
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    result = ProgressiveTrainer(config).train_rack(builder, batches())
    assert result["joint_tuning"]["trainable_params"] == builder.build_rack().get_parameter_count()
    assert result["joint_tuning"]["loss_last"] < result["joint_tuning"]["loss_first"]


def test_tuple_batches_and_bad_loaders(tiny):
    config = config_of(tiny)
    tuples = [(b["input_ids"], torch.ones_like(b["input_ids"])) for b in batches()]
    builder = ProgressiveRackBuilder(config)
    assert ProgressiveTrainer(config).train_progressively(builder, tuples, 1)["final_loss"] > 0
    with pytest.raises(KeyError, match="input_ids"):
        ProgressiveTrainer(config).train_rack(builder, [{"ids": torch.zeros(1, 4)}])
    with pytest.raises(ValueError, match="gives no batches"):
        ProgressiveTrainer(config).train_rack(builder, [])


def test_append_and_prepend_put_stacks_where_they_say(tiny):
    builder = ProgressiveRackBuilder(config_of(tiny))
    first, second, third = builder.append_stack(), builder.append_stack(), builder.prepend_stack(n_blocks=2)
    rack = builder.build_rack()
    assert list(rack.stacks) == [third, first, second]
    assert [s.uid for s in rack.stacks] == ["s2", "s0", "s1"]
    assert [s.stack_id for s in rack.stacks] == [0, 1, 2]
    assert builder.build_rack() is rack
    assert builder.get_stack_info(0)["n_blocks"] == 2
    logits = rack(torch.randint(0, 31, (1, 5)))
    assert logits.shape == (1, 5, 31)


def test_builder_from_dimensions_equals_builder_from_config(tiny):
    dimensions = {"vocab_size": 31, "d_model": 16, "d_ff": 64, "n_heads": 2}
    builder = ProgressiveRackBuilder(**dimensions)
    assert builder.append_stack(n_blocks=1).d_model == 16
    both = ProgressiveRackBuilder(config_of(tiny), vocab_size=31, d_model=16)
    assert both.append_stack().d_model == 16
    with pytest.raises(ValueError, match=r"d_model=32 contradicts"):
        ProgressiveRackBuilder(config_of(tiny), d_model=32)
    with pytest.raises(TypeError, match="give a config, or dimensions"):
        ProgressiveRackBuilder()


def test_builder_refuses_what_does_not_fit(tiny):
    config = config_of(tiny, training__progressive__max_stacks=3)
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(ValueError, match="no stacks yet"):
        builder.build_rack()
    with pytest.raises(ValueError, match="n_blocks must be at least 1"):
        builder.append_stack(n_blocks=0)
    with pytest.raises(ValueError, match="unknown precision 'int3'; known: full"):
        builder.append_stack(precision="int3")
    wide = ProgressiveRackBuilder(vocab_size=31, d_model=32, d_ff=64, n_heads=2).append_stack(n_blocks=1)
    with pytest.raises(ValueError, match="32 wide, the rack 16"):
        builder.append_stack(wide)
    for _ in range(3):
        builder.append_stack()
    with pytest.raises(ValueError, match="max_stacks is 3"):
        builder.append_stack()
    with pytest.raises(ConfigError, match="append, prepend"):
        ProgressiveRackBuilder(config, building_mode="middle")


def test_freeze_trunk_leaves_the_newest_stack_wherever_it_stands(tiny):
    builder = ProgressiveRackBuilder(config_of(tiny))
    builder.append_stack()
    newest = builder.prepend_stack()
    assert builder.freeze_trunk() == [1]
    trainable = {n for n, p in builder.build_rack().named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trainable if n.startswith("stacks.")} == {newest.uid}
    assert not builder.build_rack().stacks[1].training
    assert builder.freeze_trunk(slice(0, 2)) == [0, 1]
    with pytest.raises(IndexError, match="stack 99 of a rack of 2"):
        builder.freeze_trunk(99)


def test_stacks_and_racks_go_to_files_and_back(tiny, tmp_path):
    a, b = (ProgressiveRackBuilder(config_of(tiny, training__seed=seed)) for seed in (1, 2))
    for builder in (a, b):
        builder.append_stack()
        builder.append_stack()
    ids = torch.randint(0, 31, (1, 7))
    path = a.save_stack(1, tmp_path / "stack.safetensors")
    assert b.load_stack(1, path)
    assert torch.equal(
        a.build_rack().stacks[1].blocks[0].attn.q.weight, b.build_rack().stacks[1].blocks[0].attn.q.weight
    )
    whole = a.save_rack(tmp_path / "rack.safetensors")
    empty = ProgressiveRackBuilder(config_of(tiny))
    assert empty.load_rack(whole)
    assert torch.equal(empty.build_rack()(ids), a.build_rack()(ids))
    with pytest.raises(CheckpointError, match="not a stack"):
        b.load_stack(0, whole)
    with pytest.raises(FileNotFoundError):
        b.load_stack(0, tmp_path / "nowhere")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="safetensors"):
        b.load_stack(0, tmp_path / "junk")
    small = ProgressiveRackBuilder(vocab_size=31, d_model=16, d_ff=32, n_heads=2)
    small.append_stack(n_blocks=1)
    before = {name: tensor.clone() for name, tensor in small.build_rack().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"does not fit: .*needed"):
        small.load_stack(0, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.build_rack().state_dict().items())


@pytest.mark.parametrize("kind", ["stack", "rack"])
def test_any_flipped_bit_of_a_saved_stack_or_rack_is_found(tiny, tmp_path, kind):
    builder = ProgressiveRackBuilder(config_of(tiny))
    builder.append_stack()
    path = builder.save_stack(0, tmp_path / "a") if kind == "stack" else builder.save_rack(tmp_path / "a")
    whole = path.read_bytes()
    assert (
        path.read_bytes()
        == (
            builder.save_stack(0, tmp_path / "b") if kind == "stack" else builder.save_rack(tmp_path / "b")
        ).read_bytes()
    )
    start = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(30):
        at = random.randrange(start, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :])
        fresh = ProgressiveRackBuilder(config_of(tiny))
        load = fresh.load_rack if kind == "rack" else partial(builder.load_stack, 0)
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            load(path)
        assert (caught.value.exit_code, caught.value.part) == (3, kind)
        assert fresh.n_stacks == 0
    for wrong in (whole[:-1], whole + b"x", whole[: start - 1]):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError):
            builder.load_stack(0, path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(CheckpointError, match="version '2'"):
        builder.load_rack(path) if kind == "rack" else builder.load_stack(0, path)
