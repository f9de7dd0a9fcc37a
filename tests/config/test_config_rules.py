"""What must hold between keys, which keys have no effect beside others, and the deprecated keys."""

import warnings

import pytest

from stackwise import ConfigError, StackWiseConfig
from stackwise.config.document import parse
from stackwise.config.notes import INERT
from stackwise.config.rules import RULES
from stackwise.config.shape import field_at, walk

BROKEN = [
    (
        "model: {d_model: 100}",
        "model.n_heads",
        "must divide model.d_model 100, got 12; allowed: 1, 2, 4, 5, 10, 20, 25, 50, 100",
    ),
    ("model: {d_model: 12, n_heads: 4}", "model.d_model", "even head width"),
    ("model: {n_kv_heads: 5}", "model.n_kv_heads", "must divide model.n_heads 12, got 5"),
    ("model: {n_kv_heads: 24}", "model.n_kv_heads", "allowed: 1, 2, 3, 4, 6, 12"),
    ("model: {freeze_up_proj: true, ffn_type: gelu}", "model.freeze_up_proj", "swiglu or geglu"),
    (
        "model: {attention_preset: custom}",
        "model.attention_custom",
        "got null; allowed: map of attention_type",
    ),
    ("model: {attention_preset: custom, attention_custom: {}}", "model.attention_custom", "got {}"),
    (
        "model: {pos_encoding: learned, use_rope: true}",
        "model.pos_encoding",
        "disagrees with model.use_rope true",
    ),
    (
        "model: {pos_encoding: rope, use_rope: false}",
        "model.pos_encoding",
        "remove model.use_rope or set it to true",
    ),
    ("training: {seq_len: 4096}", "training.seq_len", "exceeds model.max_seq_len 2048, got 4096"),
    (
        "training: {progressive: {target_stacks: 5, max_stacks: 4}}",
        "training.progressive.target_stacks",
        "exceeds training.progressive.max_stacks 4, got 5",
    ),
    (
        "model: {architecture: {n_stacks: 13}}",
        "model.architecture.n_stacks",
        "raise training.progressive.max_stacks",
    ),
    (
        "training: {progressive: {stage_weights: [1, 2, 3]}}",
        "training.progressive.stage_weights",
        "needs one number per stack, 2 in all, got [1.0, 2.0, 3.0]",
    ),
    ("model: {attention_preset: bert_style}", "model.attention_preset", "clm needs causal attention"),
    ("model: {short_conv: 1}", "model.short_conv", "covers no earlier token"),
    (
        "model: {attention_preset: custom, attention_custom: {qk_norm: true}}",
        "model.attention_preset",
        "clm needs causal attention",
    ),
    (
        "model: {attention_overrides: {attention_mode: bidirectional}}",
        "model.attention_preset",
        "set model.attention_overrides.attention_mode to causal",
    ),
    (
        "model: {norm_placement: post}\ntraining: {progressive: {new_stack_init: zero}}",
        "training.progressive.new_stack_init",
        "allowed: copy, random; or set model.norm_placement to pre",
    ),
    (
        "training: {optimizer: {custom_params: {lr: 1, eps: 2}}}",
        "training.optimizer.custom_params",
        "set training.optimizer.lr, training.optimizer.eps instead",
    ),
    (
        "training: {optimizer: {custom_params: {params: []}}}",
        "training.optimizer.custom_params",
        "filled in by the trainer",
    ),
    (
        "training: {optimizer: {groups: [{match: a}]}}",
        "training.optimizer.groups.0",
        "give it lr or weight_decay",
    ),
    (
        "training: {progressive: {progressive_qlora: true}}",
        "training.progressive.progressive_qlora",
        "set training.progressive.qlora_enabled to true",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, trunk_lora_mode: merge, "
        "qlora_method: bottleneck}}",
        "training.progressive.trunk_lora_mode",
        "bottlenecks are not linear and cannot be folded into a weight, got 'merge'; allowed: reuse",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, trunk_lora_mode: merge, "
        "qlora_method: dora}}",
        "training.progressive.trunk_lora_mode",
        "set training.progressive.qlora_method to lora or mora",
    ),
    (
        "training: {progressive: {new_stack_precision: qlora}}",
        "training.progressive.new_stack_precision",
        "set training.progressive.qlora_enabled to true, or choose nf4",
    ),
    (
        "training: {progressive: {new_stack_precision: qlora, qlora_enabled: true, trunk_precision: fp8}}",
        "training.progressive.trunk_precision",
        "stored as nf4 from the start, got 'fp8'; allowed: nf4, null",
    ),
    (
        "training: {optimizer: {optimizer_type: RAdam, custom_params: {weight_decay: 1}}}",
        "training.optimizer.custom_params",
        "set training.optimizer.weight_decay instead",
    ),
    (
        "training: {optimizer: {optimizer_type: SGD, memory: int8}}",
        "training.optimizer.memory",
        "of AdamW, Adam, Muon in eight bits, not those of SGD, got 'int8'; allowed: full",
    ),
    (
        "training: {optimizer: {memory: fused}}",
        "training.max_grad_norm",
        "got 1.0; allowed: 0; or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {max_grad_norm: 0, gradient_accumulation_steps: 2, optimizer: {memory: fused}}",
        "training.gradient_accumulation_steps",
        "allowed: 1; raise training.batch_size instead",
    ),
    (
        "training: {max_grad_norm: 0, on_nonfinite: skip, optimizer: {memory: fused}}",
        "training.on_nonfinite",
        "allowed: stop; or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {max_grad_norm: 0, dtype: float16, optimizer: {memory: fused}}",
        "training.dtype",
        "allowed: auto, bfloat16, float32",
    ),
    ("data: {source: text}", "data.path", "the source text needs a path, got null; allowed: files or globs"),
    ("data: {source: hf}", "data.path", "the name of a data set"),
    ("data: {path: a.txt}", "data.path", "the source stdlib reads no path"),
]


@pytest.mark.parametrize(
    ("text", "key", "message"), BROKEN, ids=[f"{key}-{i}" for i, (_, key, _) in enumerate(BROKEN)]
)
def test_a_broken_rule_is_named(text, key, message):
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_dict(parse(text, "").data)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert message in str(caught.value)


def test_every_rule_is_broken_by_an_example():
    found = set()
    for text, _, _ in BROKEN:
        config = StackWiseConfig(**parse(text, "").data)
        found |= {check.__name__ for _, check in RULES if check(config)}
    assert found == {check.__name__ for _, check in RULES}


def test_rules_and_notes_name_keys_that_exist():
    for path in [path for keys, _ in RULES for path in keys] + [tuple(key.split(".")) for key, _, _ in INERT]:
        assert field_at(StackWiseConfig, path)[1] is not None, path


ALLOWED = [
    "model: {d_model: 12, n_heads: 4, pos_encoding: none}",
    "model: {architecture: {n_stacks: 13}}\ntraining: {progressive: {enabled: false}}",
    "model: {architecture: {n_stacks: 13}}\ntraining: {progressive: {target_stacks: 3}}",
    "model: {norm_placement: post}\ntraining: {progressive: {enabled: false, new_stack_init: zero}}",
    "training: {progressive: {enabled: false, stage_weights: [1, 2, 3]}}",
    "model: {attention_preset: bert_style, attention_overrides: {attention_mode: causal}}",
    "model: {attention_preset: custom, attention_custom: {attention_mode: causal}}",
    "model: {pos_encoding: learned, use_rope: false}",
    "data: {source: hf, path: [a, b]}",
    "training: {progressive: {qlora_enabled: true, progressive_qlora: true, qlora_method: dora}}",
    "training: {progressive: {new_stack_precision: qlora, qlora_enabled: true, trunk_precision: nf4}}",
    "training: {progressive: {qlora_enabled: true, progressive_qlora: true, trunk_lora_mode: merge}}",
    "training: {progressive: {qlora_enabled: true, qlora_method: bottleneck, trunk_lora_mode: merge}}",
]


@pytest.mark.parametrize("text", ALLOWED)
def test_a_rule_holds_only_where_it_applies(text):
    StackWiseConfig.from_dict(parse(text, "").data).validate()


def test_use_rope_follows_pos_encoding_where_only_that_is_set():
    config = StackWiseConfig.from_dict({"model": {"pos_encoding": "learned"}})
    assert config.model.use_rope is False
    config.model.pos_encoding = "rope"
    assert config.model.use_rope is True
    config.model.use_rope = False
    with pytest.raises(ConfigError, match="disagrees"):
        config.validate()


def test_attention_presets():
    def attention(**model):
        return StackWiseConfig(model=model).model.attention

    assert attention() == {
        "attention_type": "mha",
        "attention_mode": "causal",
        "n_kv_heads": 12,
        "qk_norm": False,
    }
    assert attention(attention_preset="bert_style")["attention_mode"] == "bidirectional"
    gqa = attention(attention_preset="efficient_gqa")
    assert (gqa["attention_mode"], gqa["n_kv_heads"]) == ("bidirectional", 3)
    assert attention(attention_preset="efficient_gqa", n_heads=2)["n_kv_heads"] == 1
    assert attention(attention_preset="efficient_gqa", n_heads=18)["n_kv_heads"] == 3
    assert attention(attention_preset="efficient_gqa", n_kv_heads=6)["n_kv_heads"] == 6
    custom = {"attention_mode": "causal"}
    assert attention(attention_preset="custom", attention_custom=custom, qk_norm=True) == {
        **attention(),
        "qk_norm": True,
    }
    assert attention(attention_custom={"attention_mode": "bidirectional"})["attention_mode"] == "causal"
    assert attention(qk_norm=True, attention_overrides={"qk_norm": False})["qk_norm"] is False


NOTED = [
    ("model: {attention_custom: {qk_norm: true}}", "model.attention_custom has no effect"),
    (
        "model: {pos_encoding: learned, rope_theta: 500}",
        "model.rope_theta has no effect: positions are not rotary",
    ),
    (
        "model: {architecture: {n_stacks: 4}}\ntraining: {progressive: {target_stacks: 3}}",
        "target_stacks wins",
    ),
    (
        "training: {max_steps: 9, epochs_per_stack: 2}",
        "training.epochs_per_stack has no effect: training.max_steps wins",
    ),
    ("training: {decay_fraction: 0.5}", "training.lr_schedule is not wsd"),
    ("training: {min_lr_ratio: 0.5, lr_schedule: constant}", "the learning rate is constant"),
    ("training: {new_stack_lr: 1, progressive: {enabled: false}}", "training.new_stack_lr has no effect"),
    ("training: {trunk_lr: 1, progressive: {joint_tuning: false}}", "older stacks never train again"),
    (
        "training: {optimizer: {adam_lr: 1}}",
        "training.optimizer.adam_lr has no effect: the optimizer is not Muon",
    ),
    ("training: {optimizer: {momentum: 0.5}}", "only SGD and Muon read it"),
    (
        "training: {optimizer: {optimizer_type: SGD, betas: [0.5, 0.5]}}",
        "training.optimizer.betas has no effect",
    ),
    ("training: {optimizer: {optimizer_type: SGD, eps: 1e-3}}", "training.optimizer.eps has no effect"),
    (
        "training: {progressive: {enabled: false, new_stack_init: random}}",
        "training.progressive.enabled is false",
    ),
    ("training: {progressive: {joint_tuning: false, joint_tuning_fraction: 0.5}}", "there is no joint phase"),
    ("training: {progressive: {qlora_rank: 4}}", "training.progressive.qlora_enabled is false"),
    (
        "training: {progressive: {qlora_enabled: true, qlora_rank_pattern: linear}}",
        "training.progressive.qlora_strategy is not progressive",
    ),
    (
        "training: {progressive: {qlora_enabled: true, qlora_configs: {0: {rank: 1, alpha: 1}}}}",
        "training.progressive.qlora_strategy is not variable",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora_rank: 4}}",
        "training.progressive.progressive_qlora is false",
    ),
    (
        "training: {progressive: {qlora_enabled: true, qlora_method: mora, qlora_alpha: 4}}",
        "training.progressive.qlora_alpha has no effect: MoRA and bottlenecks are not scaled",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, target_stacks: 1}}",
        "training.progressive.progressive_qlora has no effect: no stack is added to a trained one",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, progressive_qlora_rank: 16}}",
        "training.progressive.progressive_qlora_rank is not below qlora_rank",
    ),
    (
        "training: {progressive: {trunk_precision: nf4, trunk_strategy: trainable}}",
        "training.progressive.trunk_precision has no effect: no stack is ever frozen",
    ),
    ("training: {progressive: {trunk_precision: nf4, enabled: false}}", "no stack is ever frozen"),
    (
        "training: {progressive: {fake_quant: true, trunk_precision: fp32}}",
        "training.progressive.fake_quant has no effect: frozen stacks are stored in fp32",
    ),
    ("data: {eval_path: b.txt, eval_fraction: 0.5}", "data.eval_path wins"),
    ("data: {packing: false, doc_mask: false}", "data.doc_mask has no effect"),
    ("data: {text_key: body}", "data.text_key has no effect"),
    ("generation: {temperature: 0, top_k: 3}", "generation.top_k has no effect: temperature 0 is greedy"),
    ("generation: {temperature: 0, top_p: 0.5}", "generation.top_p has no effect"),
    ("generation: {temperature: 0, seed: 3}", "generation.seed has no effect"),
    ("model: {tie_embeddings: true}", "false lets it train at every stage"),
    ("training: {progressive: {joint_tuning: false}}", "training.progressive.joint_tuning is off"),
    ("training: {max_steps: 10, warmup_steps: 10}", "the learning rate never reaches its peak"),
]


@pytest.mark.parametrize(("text", "note"), NOTED, ids=[note[:40] for _, note in NOTED])
def test_a_key_without_effect_is_noted(text, note):
    notes = StackWiseConfig.from_dict(parse(text, "").data).notes()
    assert any(note in line for line in notes)


def test_every_growth_key_is_noted_end_to_end():
    values = {
        "max_stacks": 3,
        "target_stacks": 2,
        "trunk_strategy": "trainable",
        "new_stack_init": "random",
        "train_head": "first",
        "train_embedding": "never",
        "global_head_blocks": 0,
        "joint_tuning": False,
        "joint_tuning_fraction": 0.5,
        "growth_optimizer": "carry",
        "rewarmup_fraction": 0.5,
        "stage_weights": [1],
    }
    notes = StackWiseConfig.from_dict({"training": {"progressive": {"enabled": False, **values}}}).notes()
    assert [note.split(" has")[0] for note in notes] == [f"training.progressive.{name}" for name in values]


def test_nothing_is_noted_about_defaults():
    assert StackWiseConfig().notes() == []
    assert StackWiseConfig.from_dict(StackWiseConfig().to_dict()).notes() == []
    assert StackWiseConfig.from_dict({"training": {"decay_fraction": 0.2}}).notes() == []


# Deprecated keys


def test_n_blocks_and_attention_type_load_with_one_warning():
    text = {
        "n_blocks": 8,
        "attention_type": "standard",
        "architecture": {"n_stacks": 2, "blocks_per_stack": 4},
    }
    with pytest.warns(DeprecationWarning, match="deprecated: model") as caught:
        config = StackWiseConfig.from_dict({"model": text})
    assert len(caught) == 1
    assert "model.n_blocks" in str(caught[0].message)
    assert config.model.attention["attention_type"] == "mha"
    assert config.model.architecture.total_blocks == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StackWiseConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "model", [{"n_blocks": 12}, {"architecture": {"n_blocks": 12}}, {"n_blocks": 12, "architecture": None}]
)
def test_n_blocks_alone_gives_the_number_of_stacks(model):
    with pytest.warns(DeprecationWarning, match="deprecated: model"):
        config = StackWiseConfig.from_dict({"model": model})
    assert config.model.architecture.n_stacks == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"n_blocks": 7, "architecture": {"n_stacks": 2}},
            "must equal n_stacks * blocks_per_stack, got 7; allowed: 2 * 4",
        ),
        ({"n_blocks": 7}, "must be a multiple of blocks_per_stack, got 7"),
        ({"n_blocks": "8"}, "model.n_blocks: wrong value, got '8'; allowed: whole number >= 1"),
        ({"n_blocks": 8, "architecture": {"n_blocks": 12}}, "model.architecture.n_blocks: must equal"),
        ({"attention_type": "mla"}, "model.attention_type: wrong value, got 'mla'; allowed: mha, standard"),
        ({"attention_type": 3}, "model.attention_type: wrong value, got 3"),
    ],
)
def test_wrong_deprecated_keys_are_named(model, message):
    with pytest.warns(DeprecationWarning, match="deprecated: model"), pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_dict({"model": model})
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_no_key_is_both_deprecated_and_known():
    keys = {path for path, _ in walk(StackWiseConfig)}
    assert not keys & {
        ("model", "n_blocks"),
        ("model", "architecture", "n_blocks"),
        ("model", "attention_type"),
    }
