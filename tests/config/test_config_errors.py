"""Wrong configurations: each gets its key, its line, what was given, what is allowed and the way out."""

import pickle
from pathlib import Path

import pytest

from stackwise import ArchitectureConfig, ConfigError, StackWiseConfig
from stackwise.config.errors import Problem, did_you_mean, nearest, show
from stackwise.model.settings import FFN_TYPES, ModelSettings


def error_of(tmp_path: Path, text: str | bytes) -> ConfigError:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_yaml(path)
    return caught.value


def test_one_error_lists_problems_of_shape_and_of_rules_together(tmp_path):
    error = error_of(
        tmp_path,
        """\
model:
  d_model: 30
  n_heads: 4
  n_kv_heads: 8
  attention_preset: brt_style
training:
  progressive:
    max_stacks: -1
""",
    )
    assert sorted((p.key, p.line) for p in error.problems) == [
        ("model.attention_preset", 5),
        ("model.n_heads", 3),
        ("model.n_kv_heads", 4),
        ("training.progressive.max_stacks", 8),
    ]
    assert str(error).startswith("4 problems in the configuration:\n")
    assert "did you mean 'bert_style'?" in str(error)
    assert (
        f"{tmp_path / 'c.yaml'}:8: training.progressive.max_stacks: wrong value, got -1; allowed: whole number >= 1"
        in str(error)
    )


def test_a_key_written_twice_shows_both_lines(tmp_path):
    error = error_of(
        tmp_path,
        """\
training:
  progressive:
    max_stacks: 3
  seq_len: 16
  progressive:
    max_stacks: 4
  seq_len: 32
""",
    )
    assert [(p.key, p.line) for p in error.problems] == [("training.progressive", 5), ("training.seq_len", 7)]
    assert "written twice, in lines 2 and 5" in str(error)
    assert "written twice, in lines 4 and 7" in str(error)


WRONG = [
    # unknown keys
    ("optimzer: {lr: 1}", ["optimzer: unknown key", "did you mean 'training.optimizer'?"]),
    ("training: {lr: 1}", ["c.yaml:1: training.lr: unknown key; did you mean 'training.optimizer.lr'?"]),
    ("model: {n_stacks: 3}", ["model.n_stacks: unknown key; did you mean 'model.architecture.n_stacks'?"]),
    ("model: {d_modell: 3}", ["model.d_modell: unknown key; did you mean 'model.d_model'?"]),
    ("training: {optimizer: {learning-rate: 1}}", ["training.optimizer.learning-rate: unknown key"]),
    ("1: 2", ["1: unknown key"]),
    (
        "model: {attention_overrides: {attention_mod: causal}}",
        ["model.attention_overrides.attention_mod: unknown key", "attention_mode'?"],
    ),
    (
        "model: {attention_custom: {kernel_dims: 8}}",
        ["attention_custom.kernel_dims: unknown key", "kernel_dim'?"],
    ),
    ("model: {attention_custom: {kernel_dim: 0}}", ["attention_custom.kernel_dim: wrong value, got 0"]),
    ("model: {attention_preset: mlgk}", ["model.attention_preset", "did you mean 'mlgka'?"]),
    # wrong types
    ("model: 3", ["c.yaml:1: model: wrong value, got 3; allowed: map of d_model"]),
    ("model: {d_model: true}", ["model.d_model: wrong value, got true; allowed: whole number >= 1"]),
    ("model: {d_model: '128'}", ["model.d_model: wrong value, got '128'"]),
    ("model: {d_model: 12.5}", ["model.d_model: wrong value, got 12.5"]),
    ("model: {bias: 1}", ["model.bias: wrong value, got 1; allowed: true, false"]),
    ("training: {compile: 'yes'}", ["training.compile: wrong value, got 'yes'; allowed: true, false"]),
    (
        "training: {compile: yes}",
        ["c.yaml:1: training.compile: some readers", "write true, or put it in quotes"],
    ),
    ("model:\n\td_model: 3", ["c.yaml:2: not YAML", "indent with blanks, not with tabs"]),
    ("model: {d_model: !!python/object/apply:os.system [x]}", ["the tag", "python/object/apply:os.system"]),
    ("training: {optimizer: {lr: 1e999}}", ["training.optimizer.lr: 1e999 is too large for a number"]),
    (
        "training: {optimizer: {lr: fast}}",
        ["training.optimizer.lr: wrong value, got 'fast'; allowed: number > 0"],
    ),
    ("training: {run_id: 42}", ["training.run_id: wrong value, got 42", "put it in quotes"]),
    ("generation: {stop: END}", ["generation.stop: wrong value, got 'END'; allowed: list of text"]),
    ("data: {source: text, path: []}", ["data.path: wrong value, got []"]),
    ("training: {optimizer: {groups: [3]}}", ["training.optimizer.groups.0: wrong value, got 3"]),
    # values out of bounds
    (
        "model: {architecture: {n_stacks: 0}}",
        ["model.architecture.n_stacks: wrong value, got 0; allowed: whole number >= 1"],
    ),
    ("model: {dropout: 1.0}", ["model.dropout: wrong value, got 1.0; allowed: number >= 0 and < 1"]),
    ("model: {residual_gain: 1.5}", ["model.residual_gain", "number >= 0 and <= 1, null"]),
    ("model: {vocab_size: 1}", ["model.vocab_size", "whole number >= 2, null"]),
    ("training: {optimizer: {lr: 0}}", ["training.optimizer.lr: wrong value, got 0; allowed: number > 0"]),
    ("training: {optimizer: {lr: .nan}}", ["training.optimizer.lr: wrong value, got nan"]),
    (
        "training: {optimizer: {betas: [0.9]}}",
        ["training.optimizer.betas", "list of 2 of: number >= 0 and < 1"],
    ),
    ("training: {optimizer: {betas: [0.9, 1.0]}}", ["training.optimizer.betas: wrong value, got [0.9, 1.0]"]),
    ("training: {loss_chunk_tokens: 0}", ["training.loss_chunk_tokens", "auto, whole number >= 1"]),
    ("training: {seed: -1}", ["training.seed: wrong value, got -1"]),
    (
        "training: {progressive: {joint_tuning_fraction: 1.0}}",
        ["joint_tuning_fraction", "number > 0 and < 1"],
    ),
    ("training: {progressive: {stage_weights: [1, 0]}}", ["stage_weights", "number > 0"]),
    ("generation: {top_p: 0}", ["generation.top_p: wrong value, got 0; allowed: number > 0 and <= 1"]),
    # names
    (
        "model: {ffn_type: swilgu}",
        ["model.ffn_type: not a known name, got 'swilgu'", "relu2", "did you mean 'swiglu'?"],
    ),
    (
        "model: {norm: batchnorm}",
        ["model.norm: not a known name", "allowed: rmsnorm, rmsnorm_offset, layernorm"],
    ),
    ("model: {pos_encoding: alby}", ["model.pos_encoding", "rope, learned, sinusoidal, alibi, none, null"]),
    ("model: {rope_scaling: {factor: 2.0}}", ["model.rope_scaling.type: missing"]),
    ("model: {rope_scaling: {type: null, factor: 2.0}}", ["model.rope_scaling.type: wrong value, got null"]),
    (
        "model: {attention_overrides: {attention_type: mls}}",
        ["attention_overrides.attention_type", "allowed: mha, mla"],
    ),
    ("training: {optimizer: {optimizer_type: adamw}}", ["did you mean 'AdamW'?"]),
    ("training: {lr_schedule: cosin}", ["training.lr_schedule", "did you mean 'cosine'?"]),
    (
        "training: {device: gpu}",
        ["training.device: not a device, got 'gpu'; allowed: auto, cpu, cuda, cuda:N, mps"],
    ),
    ("training: {run_id: a/b}", ["training.run_id: not usable as the name of a run folder, got 'a/b'"]),
    ("training: {run_id: ..}", ["training.run_id"]),
    (
        "training: {progressive: {building_mode: middle}}",
        ["building_mode: wrong value, got 'middle'; allowed: append"],
    ),
    (
        "training: {progressive: {training_objective: difusion}}",
        ["training_objective", "allowed: clm, mlm, diffusion, custom", "did you mean 'diffusion'"],
    ),
    # items of a list
    ("training: {optimizer: {groups: [{lr: 1}]}}", ["training.optimizer.groups.0.match: missing"]),
    (
        "training: {optimizer: {groups: [{match: '(', lr: 1}]}}",
        ["training.optimizer.groups.0.match: not a regular expression"],
    ),
    # text that is no configuration
    ("model: [1", ["c.yaml:1: not YAML"]),
    ("model:\n\t d_model: 1", ["c.yaml:2: not YAML"]),
    ("- model", ["c.yaml:1: must be a map of sections"]),
    ("a: 1\n---\nb: 2", ["not YAML", "document"]),
    ("model: {d_model: !!python/object:os.system 3}", ["the tag tag:yaml.org,2002:python/object:os.system"]),
    ("model: {d_model: !!int x}", ["model.d_model"]),
    ("? [a, b]\n: 3", ["a key must be plain text"]),
    (b"model: \xff", ["c.yaml: not UTF-8 text at byte 7"]),
    ("\0", ["c.yaml: not YAML"]),
    ("a: &a [*a]", ["c.yaml:1: not YAML: the alias *a is not supported"]),
    ("a: " + "[" * 5000, ["not YAML: nested too deeply"]),
    ("#" + " " * 1_000_001, ["c.yaml: larger than 1000000 bytes"]),
    (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in ("ab", "bc", "cd", "de", "ef")),
        ["c.yaml:2: not YAML: the alias *a"],
    ),
]


@pytest.mark.parametrize(("text", "expected"), WRONG, ids=[str(text)[:40] for text, _ in WRONG])
def test_wrong_input_is_named(tmp_path, text, expected):
    message = str(error_of(tmp_path, text))
    for part in expected:
        assert part in message
    assert "c.yaml" in message


def test_rules_run_where_another_section_has_the_wrong_shape(tmp_path):
    error = error_of(tmp_path, "model: {n_heads: 7}\ntraining: {seq_len: 9999, dtype: fp8}\ndata: []\n")
    assert [p.key for p in error.problems] == ["training.dtype", "data", "model.n_heads", "training.seq_len"]


def test_a_rule_is_left_out_where_a_key_it_reads_is_wrong_already(tmp_path):
    error = error_of(tmp_path, "model: {d_model: 30, n_heads: -4}")
    assert [p.key for p in error.problems] == ["model.n_heads"]


def test_the_place_is_that_of_a_key_somebody_wrote(tmp_path):
    error = error_of(tmp_path, "# the default of n_heads is 12\nmodel:\n  d_model: 100\n")
    assert str(error).startswith(
        f"{tmp_path / 'c.yaml'}:3: model.n_heads: must divide model.d_model 100, got 12"
    )


def test_assignment_is_checked():
    config = StackWiseConfig()
    with pytest.raises(ConfigError, match="dropout: wrong value, got 2; allowed: number >= 0 and < 1"):
        config.model.dropout = 2
    assert config.model.dropout == 0.0
    with pytest.raises(ConfigError, match="wrong value"):
        config.training.optimizer.betas = [0.9]


def test_an_unknown_attribute_is_an_attribute_error_with_the_nearest_name():
    config = StackWiseConfig()
    with pytest.raises(AttributeError, match="did you mean 'd_model'"):
        config.model.d_modl  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'd_model'"):
        config.model.d_modl = 3
    with pytest.raises(AttributeError, match="StackWiseConfig has no key 'modle'; did you mean 'model'"):
        config.modle  # noqa: B018
    assert not hasattr(config, "qqq")


def test_keywords_are_checked():
    with pytest.raises(ConfigError, match=r"n_stacks: wrong value, got 0"):
        ArchitectureConfig(n_stacks=0)
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig(model={"d_model": 0, "architecture": {"n_stack": 3}}, modle={})
    assert [p.key for p in caught.value.problems] == ["model.d_model", "model.architecture.n_stack", "modle"]


def test_validate_finds_what_assignments_broke_together():
    config = StackWiseConfig()
    assert config.validate() is None
    config.model.n_heads = 5
    config.training.seq_len = 4096
    config.training.optimizer.betas.append(0.5)
    config.training.optimizer.custom_params["lr"] = 1
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert [p.key for p in caught.value.problems] == [
        "training.optimizer.betas",
        "model.n_heads",
        "training.seq_len",
        "training.optimizer.custom_params",
    ]


def test_total_blocks_is_the_product_and_read_only():
    shape = ArchitectureConfig(n_stacks=3, blocks_per_stack=5)
    assert shape.total_blocks == 15
    with pytest.raises(AttributeError):
        shape.total_blocks = 3  # type: ignore[misc]


def test_a_registered_name_is_accepted():
    FFN_TYPES["my_ffn"] = True
    try:
        assert ModelSettings(ffn_type="my_ffn", d_model=96).ffn_width == 256
    finally:
        del FFN_TYPES["my_ffn"]
    with pytest.raises(ConfigError, match="not a known name"):
        ModelSettings(ffn_type="my_ffn")


def test_a_problem_says_only_what_it_knows():
    assert str(Problem("a.b", "wrong")) == "a.b: wrong"
    full = Problem("a.b", "wrong", None, "x, y", "did you mean 'x'?", "f.yaml", 3)
    assert str(full) == "f.yaml:3: a.b: wrong, got null; allowed: x, y; did you mean 'x'?"
    assert str(ConfigError(full)) == str(full)


def test_a_config_error_survives_pickling():
    error = ConfigError([Problem("a", "wrong", 3), Problem("b", "wrong")])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_nearest_ignores_case_and_dashes():
    assert nearest("BERT-style", ["bert_style", "gpt_style"]) == "bert_style"
    assert nearest("zzz", ["bert_style"]) is None
    assert did_you_mean("zzz", ["bert_style"]) == ""


def test_long_values_are_cut():
    assert len(show("x" * 500)) == 80
