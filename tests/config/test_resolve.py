"""What is filled in for null and auto, and why."""

from typing import Any

import pytest

from stackwise import ConfigError, StackWiseConfig
from stackwise.config.resolve import Derived, resolve
from stackwise.config.shape import walk


def derived(vocab_size: int | None = None, **sections: Any) -> dict[str, Any]:
    _, values = resolve(StackWiseConfig.from_dict(sections), vocab_size=vocab_size)
    return {value.key: value.value for value in values}


def test_the_defaults_resolve_to_a_complete_valid_configuration():
    config = StackWiseConfig()
    resolved, values = resolve(config, vocab_size=259)
    resolved.validate()
    assert config == StackWiseConfig()
    assert {value.key: value.value for value in values} == {
        "model.n_kv_heads": 12,
        "model.d_ff": 2048,
        "model.pos_encoding": "rope",
        "model.tie_embeddings": False,
        "model.vocab_size": 259,
        "training.progressive.target_stacks": 2,
        "training.progressive.joint_tuning": True,
        "training.progressive.train_head": "always",
        "training.progressive.train_embedding": "first",
        "training.new_stack_lr": 1e-4,
        "training.trunk_lr": 1e-4,
        "evaluation.batch_size": 4,
        "data.cache_dir": "runs/.data",
    }
    assert resolved.model.d_ff == 2048
    assert resolve(resolved, vocab_size=259) == (resolved, [])


def test_what_stays_open_depends_on_the_machine_or_is_a_choice():
    resolved, _ = resolve(StackWiseConfig(), vocab_size=259)
    open_keys = set()
    for path, _ in walk(StackWiseConfig):
        value: Any = resolved
        for part in path:
            value = getattr(value, str(part), "item of a list")
        if value in (None, "auto"):
            open_keys.add(".".join(map(str, path)))
    assert {key for key in open_keys if not key.startswith("model.attention_overrides.")} == {
        "model.attention_custom",
        "model.stacks",
        "model.head_dim",  # stacks may have other numbers of heads
        "model.attention_bias",
        "model.rope_scaling",
        "model.attention_softcap",
        "model.sliding_window",
        "model.full_block",
        "model.local_rope_theta",
        "model.tokenizer_embedding.family",
        "model.tokenizer_embedding.adapter_hidden_dim",
        "model.embedding_width",
        "model.head_rank",
        "model.logit_softcap",
        "model.score_width",
        "model.residual_gain",
        "objective.corruption",
        "objective.mask_token_id",
        "objective.noise_table",
        "objective.mask_draws",
        "objective.loss_fn",
        "training.progressive.independent_io",
        "training.progressive.time_interpretation",
        "training.progressive.num_time_steps",
        "training.progressive.time_boundaries",
        "training.progressive.time_step_mask_fractions",
        "training.progressive.time_embedding_dim",
        "generation.block_length",
        "training.stages",
        "training.max_steps",
        "training.device",
        "training.dtype",
        "training.loss_chunk_tokens",
        "training.optimizer.adam_lr",
        "training.progressive.new_stack_precision",
        "training.progressive.joint_lr",
        "training.progressive.growth_factor",
        "training.progressive.growth_layers",
        "training.progressive.cycle_steps",
        "training.progressive.train_stacks",
        "training.progressive.stage_weights",
        "training.progressive.cache_activations",
        "training.progressive.cache_max_bytes",
        "training.progressive.trunk_precision",
        "model.moe.d_ff",
        "data.path",
        "data.eval_path",
        "data.max_bytes",
        "checkpoint.asynchronous",
        "checkpoint.resume",
        "checkpoint.keep_every",
        "checkpoint.init_from",
        "evaluation.interval",
        "evaluation.batches",
        "tracking.sample_interval",
    }


def test_given_values_are_left_alone():
    given = {
        "model": {
            "n_kv_heads": 6,
            "d_ff": 100,
            "pos_encoding": "none",
            "tie_embeddings": True,
            "vocab_size": 300,
        },
        "training": {
            "trunk_lr": 2.0,
            "new_stack_lr": 3.0,
            "progressive": {"joint_tuning": True, "train_head": "never"},
        },
        "evaluation": {"batch_size": 9},
        "data": {"cache_dir": "elsewhere"},
    }
    assert derived(vocab_size=259, **given) == {
        "training.progressive.target_stacks": 2,
        "training.progressive.train_embedding": "first",
    }


def test_width_of_the_feed_forward():
    def d_ff(**model: Any) -> int:
        return derived(model=model)["model.d_ff"]

    assert d_ff(d_model=128, n_heads=4) == 320
    assert d_ff(d_model=16, n_heads=4) == 64
    assert d_ff(ffn_type="geglu") == 2048
    for name in ("gelu", "gelu_tanh", "silu", "relu", "relu2"):
        assert d_ff(ffn_type=name) == 3072


def test_heads_and_positions():
    gqa = {"attention_preset": "efficient_gqa", "attention_overrides": {"attention_mode": "causal"}}
    assert derived(model=gqa)["model.n_kv_heads"] == 3
    assert derived(model={"use_rope": False})["model.pos_encoding"] == "learned"


def test_end_to_end_ties_the_head_and_leaves_growth_open():
    values = derived(training={"progressive": {"enabled": False}})
    assert values["model.tie_embeddings"] is True
    assert not any(key.startswith("training.") for key in values)


def test_one_stack_has_nothing_to_tune_jointly():
    values = derived(model={"architecture": {"n_stacks": 1}})
    assert values["training.progressive.joint_tuning"] is False
    assert "training.trunk_lr" not in values
    assert "training.new_stack_lr" not in values


def test_the_target_decides_how_many_stacks():
    values = derived(model={"architecture": {"n_stacks": 1}}, training={"progressive": {"target_stacks": 3}})
    assert values["training.progressive.joint_tuning"] is True


def test_a_trainable_trunk_has_a_rate():
    progressive = {"joint_tuning": False}
    assert "training.trunk_lr" not in derived(training={"progressive": progressive})
    assert "training.trunk_lr" in derived(
        training={"progressive": {**progressive, "trunk_strategy": "trainable"}}
    )


def test_muon_has_a_second_rate():
    values = derived(training={"optimizer": {"optimizer_type": "Muon", "lr": 0.01}})
    assert values["training.optimizer.adam_lr"] == 0.01


def test_the_vocabulary_must_hold_the_tokenizer():
    assert "model.vocab_size" not in derived(vocab_size=259, model={"vocab_size": 320})
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size: smaller than the 259 tokens of the tokenizer 'byte', got 97"
    ):
        resolve(StackWiseConfig(model={"vocab_size": 97}), vocab_size=259)


def test_a_derived_value_prints_with_its_reason():
    assert str(Derived("model.d_ff", 320, "because")) == "model.d_ff = 320 (because)"
    _, values = resolve(StackWiseConfig(), vocab_size=259)
    assert all(value.reason for value in values)
