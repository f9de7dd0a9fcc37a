"""Parents of a file (`base:`), overrides from the command line, and which of them wins."""

from pathlib import Path

import pytest

from stackwise import ConfigError, StackWiseConfig


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def problems(path: Path, overrides: tuple[str, ...] = ()) -> list[tuple[str, str, int | None]]:
    """Key, name of the file and line of every problem."""
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_yaml(path, overrides)
    return [(p.key, Path(p.file).name, p.line) for p in caught.value.problems]


def test_defaults_then_parents_in_order_then_file_then_overrides(tmp_path):
    write(
        tmp_path,
        one="training: {batch_size: 1, seq_len: 1, seed: 1, max_steps: 1, optimizer: {lr: 1.0, weight_decay: 1}}",
        two="training: {seq_len: 2, seed: 2, max_steps: 2}",
        c="base: [one.yaml, two.yaml]\ntraining: {seed: 3, max_steps: 3, optimizer: {lr: 3.0}}",
    )
    training = StackWiseConfig.from_yaml(tmp_path / "c.yaml", ["training.max_steps=4"]).training
    assert (training.gradient_accumulation_steps, training.batch_size) == (1, 1)
    assert (training.seq_len, training.seed, training.max_steps) == (2, 3, 4)
    assert (training.optimizer.lr, training.optimizer.weight_decay) == (3.0, 1.0)


def test_paths_are_relative_to_the_file_that_names_them(tmp_path):
    write(
        tmp_path,
        sub__a="base: ../b.yaml\ntraining: {batch_size: 7}",
        b="training: {batch_size: 6, seed: 6}",
        c="base: sub/a.yaml",
    )
    training = StackWiseConfig.from_yaml(tmp_path / "c.yaml").training
    assert (training.batch_size, training.seed) == (7, 6)


def test_a_preset_is_a_parent_by_name(tmp_path):
    write(tmp_path, c="base: tiny-llama\nmodel: {n_kv_heads: 4}")
    config = StackWiseConfig.from_yaml(tmp_path / "c.yaml")
    assert (config.model.d_model, config.model.n_kv_heads) == (256, 4)
    assert StackWiseConfig.from_dict({"base": "tiny-llama", "model": {"n_kv_heads": 4}}) == config


def test_lists_and_null_replace_what_a_parent_says(tmp_path):
    write(
        tmp_path,
        a="generation: {stop: [x, y]}\nmodel: {d_ff: 100, attention_custom: {qk_norm: true}}",
        c="base: a.yaml\ngeneration: {stop: [z]}\nmodel: {d_ff: null, attention_custom: null}\ntraining:",
    )
    config = StackWiseConfig.from_yaml(tmp_path / "c.yaml")
    assert config.generation.stop == ["z"]
    assert config.model.d_ff is None
    assert config.model.attention_custom is None


def test_a_cycle_of_parents_is_named(tmp_path):
    write(tmp_path, a="base: b.yaml", b="base: c.yaml", c="base: [a.yaml]\nmodel: {n_heads: 0}")
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_yaml(tmp_path / "a.yaml")
    assert "c.yaml:1: base: the parents form a cycle: a.yaml -> b.yaml -> c.yaml -> a.yaml" in str(
        caught.value
    )
    assert "c.yaml:2: model.n_heads" in str(caught.value)


def test_the_same_parent_twice_is_no_cycle(tmp_path):
    write(tmp_path, a="base: c.yaml", b="base: c.yaml", c="training: {seed: 5}", d="base: [a.yaml, b.yaml]")
    assert StackWiseConfig.from_yaml(tmp_path / "d.yaml").training.seed == 5


def test_problems_of_parents_and_file_come_together_with_their_own_places(tmp_path):
    write(
        tmp_path,
        a="model:\n  d_model: 0\n  n_heads: 0\ntraining: {bach_size: 1}",
        c="base: [a.yaml, nowhere.yaml, demmo, 3]\nmodel:\n  n_heads: -1\n",
    )
    assert sorted(problems(tmp_path / "c.yaml", ("model.d_ff=x",)), key=str) == [
        ("base", "c.yaml", 1),
        ("base", "c.yaml", 1),
        ("base", "c.yaml", 1),
        ("model.d_ff", "command line", None),
        ("model.d_model", "a.yaml", 2),
        ("model.n_heads", "c.yaml", 3),
        ("training.bach_size", "a.yaml", 4),
    ]


def test_a_parent_that_is_no_yaml_is_a_problem_of_its_own_file(tmp_path):
    write(tmp_path, a="x: [", c="base: a.yaml\nmodel: {n_heads: 0}")
    assert problems(tmp_path / "c.yaml") == [("", "a.yaml", 1), ("model.n_heads", "c.yaml", 2)]


def overridden(tmp_path: Path, *overrides: str, text: str = "") -> StackWiseConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return StackWiseConfig.from_yaml(path, overrides)


def test_overrides_read_their_values_as_yaml(tmp_path):
    config = overridden(
        tmp_path,
        "training.optimizer.lr=1e-3",
        "training.max_steps=1_000",
        "training.compile=true",
        "training.loss_chunk_tokens=64",
        "training.progressive.joint_tuning=false",
        "training.optimizer={weight_decay: 0.5}",
        "training.optimizer.custom_params.nesterov=true",
        "generation.stop=[a, b]",
        "model.d_ff=null",
    )
    assert config.training.optimizer.lr == 1e-3
    assert config.training.optimizer.weight_decay == 0.5
    assert config.training.optimizer.custom_params == {"nesterov": True}
    assert config.training.max_steps == 1000
    assert config.training.compile is True
    assert config.training.loss_chunk_tokens == 64
    assert config.training.progressive.joint_tuning is False
    assert config.generation.stop == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ROMEO:", "ROMEO:"),
        ("to be: or not", "to be: or not"),
        ("a # b", "a # b"),
        ("[INST] hi", "[INST] hi"),
        ("def ", "def "),
        ("42", "42"),
        ("null", "null"),
        ("", ""),
        ('"quoted\\n"', "quoted\n"),
        ("{", "{"),
    ],
)
def test_a_key_for_text_takes_the_text_as_it_stands(tmp_path, text, expected):
    assert overridden(tmp_path, f"tracking.sample_prompt={text}").tracking.sample_prompt == expected


def test_text_or_list_or_null(tmp_path):
    base = "data: {source: text, path: p, eval_path: q}"
    assert overridden(tmp_path, "data.path=a=b.txt", text=base).data.path == "a=b.txt"
    assert overridden(tmp_path, "data.path=[a, b]", text=base).data.path == ["a", "b"]
    assert overridden(tmp_path, "data.eval_path=null", text=base).data.eval_path is None
    assert overridden(tmp_path, "training.run_id=7").training.run_id == "7"


def test_an_item_of_a_list_is_overridden_in_place(tmp_path):
    text = "training: {optimizer: {groups: [{match: a, lr: 1}, {match: b, lr: 2}]}}"
    config = overridden(
        tmp_path,
        "training.optimizer.groups.1.lr=3",
        "training.optimizer.groups.0.match=^42$",
        "training.optimizer.betas.0=0.5",
        text=text,
    )
    assert [(g.match, g.lr) for g in config.training.optimizer.groups] == [("^42$", 1.0), ("b", 3.0)]
    assert config.training.optimizer.betas == [0.5, 0.95]
    assert overridden(tmp_path).training.optimizer.betas == [0.9, 0.95]


def test_one_override_needs_no_list(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert StackWiseConfig.from_yaml(path, "training.seed=5").training.seed == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.lr=1e-3", "command line: optimzer.lr: unknown key; did you mean 'training.optimizer.lr'?"),
        ("training.optimizer.l=1", "training.optimizer.l: unknown key"),
        ("training.optimizer.lr.x=1", "training.optimizer.lr.x: unknown key"),
        ("training.seq_lne=1", "did you mean 'training.seq_len'?"),
        ("base=demo", "base: unknown key"),
        ("training.seed", "training.seed: not an override; allowed: section.key=value"),
        ("=1", "not an override"),
        ("", "not an override"),
        ("model.d_model=[", "model.d_model: not YAML, got '['"),
        (
            "model.d_model=big",
            "command line: model.d_model: wrong value, got 'big'; allowed: whole number >= 1",
        ),
        ("model.d_model=", "model.d_model: wrong value, got null"),
        ("training.optimizer.groups.0.lr=1", "no such item, the list has 0"),
        ("training.optimizer.betas.2=0.5", "no such item, the list has 2"),
        (
            "training.optimizer.betas.0=2",
            "command line: training.optimizer.betas: wrong value, got [2, 0.95]",
        ),
        ("training=3", "command line: training: wrong value, got 3"),
        ("model.n_heads=7", "command line: model.n_heads: must divide model.d_model 768, got 7"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        overridden(tmp_path, override)
    assert message in str(caught.value)


def test_wrong_overrides_are_reported_with_the_problems_of_the_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        overridden(tmp_path, "modle.x=1", "training.seed=-1", text="model: {norm: x}")
    assert sorted(p.key for p in caught.value.problems) == ["model.norm", "modle.x", "training.seed"]
