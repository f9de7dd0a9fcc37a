"""What a YAML file means, and that a configuration survives being written and read."""

import json
import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from stackwise import ConfigError, StackWiseConfig
from stackwise.config.document import Document, dump, parse, parse_value
from stackwise.config.load import apply_overrides
from stackwise.config.resolve import resolve
from stackwise.config.rules import broken_rules
from stackwise.config.schema import schema_rows
from stackwise.config.shape import alternatives, dotted, item_section_of, nearest_key, section_of, walk
from stackwise.config.types import OneOf


def read(tmp_path: Path, text: str, overrides: Any = ()) -> StackWiseConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return StackWiseConfig.from_yaml(path, overrides)


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert read(tmp_path, "") == StackWiseConfig()
    assert read(tmp_path, "# nothing but a comment\n") == StackWiseConfig()
    assert read(tmp_path, "training:\nmodel:\n  architecture:\n") == StackWiseConfig()


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        StackWiseConfig.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="did you mean 'demo'"):
        StackWiseConfig.from_yaml("demmo")


def test_numbers_flags_and_text_read_as_they_look(tmp_path):
    config = read(tmp_path, "training: {optimizer: {lr: 1e-4}, max_steps: 1e3}")
    assert config.training.optimizer.lr == 1e-4
    assert isinstance(config.training.optimizer.lr, float)
    assert config.training.max_steps == 1000
    assert parse_value("1e-4") == 1e-4
    assert parse_value("1_000") == 1000
    assert parse_value("0x10") == 16
    assert parse_value(".5") == 0.5
    assert parse_value("-.inf") == -math.inf
    for text in ("2020-01-01", "1:75", "none", "e5", "1.2.3", "nope", "on time"):
        assert parse_value(text) == text
    assert parse_value("null") is None
    assert parse_value("~") is None


def test_a_whole_number_serves_as_a_rate(tmp_path):
    config = read(tmp_path, "generation: {temperature: 1}")
    assert config.generation.temperature == 1.0
    assert isinstance(config.generation.temperature, float)


def test_a_byte_order_mark_is_read(tmp_path):
    config = read(tmp_path, "\ufefftraining: {new_stack_lr: &rate 3e-4}")
    assert config.training.new_stack_lr == 3e-4


LITERALS: list[tuple[str, Any]] = [
    *(
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("0", 0),
    ),
    *(("-0", 0), ("0x1F", 31), ("+7", 7), ("0.5", 0.5), (".inf", math.inf), ("true", True), ("False", False)),
    *(
        ("null", None),
        ("~", None),
        ("", None),
        ("y", "y"),
        ("n", "n"),
        ("0o17", "0o17"),
        ("2020-01-01", "2020-01-01"),
    ),
    *(("'no'", "no"), ('"017"', "017"), ("'12:30'", "12:30"), ("1:99", "1:99"), ("1e", "1e"), ("0b1", "0b1")),
]
REFUSED = [
    *("no", "No", "NO", "yes", "Yes", "on", "On", "off", "OFF"),
    *("017", "00", "-07", "0_1", "12:30", "1:2:3", "-1:30", "12:30.5", "1e999"),
]


@pytest.mark.parametrize(("text", "value"), LITERALS)
def test_a_literal_is_what_it_looks_like(text: str, value: Any) -> None:
    found = parse_value(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", REFUSED)
def test_a_literal_that_readers_take_in_different_ways_is_refused_with_a_way_out(text: str) -> None:
    document = parse(f"a: 1\nb: {text}\nc: ['{text}', \"{text}\"]", "f.yaml")
    (problem,) = document.problems
    assert re.search("write|in quotes", problem.message)
    assert (problem.key, problem.line) == ("b", 2)
    assert document.data == {"a": 1, "c": [text, text]}
    assert parse(dump({"key": text}), "f").data == {"key": text}


def test_where_only_text_will_do_an_override_is_text_all_the_same() -> None:
    document = Document()
    apply_overrides(document, ["training.run_id=017", "tracking.sample_prompt=12:30"], StackWiseConfig)
    config = StackWiseConfig.from_dict(document.data)
    assert (config.training.run_id, config.tracking.sample_prompt) == ("017", "12:30")
    apply_overrides(document, ["training.compile=on"], StackWiseConfig)
    assert "write true" in str(document.problems[0])


def misspelt(word: str, draw: random.Random) -> str:
    """One letter left out, doubled, replaced, or two that changed places."""
    i, how = draw.randrange(len(word) - 1), draw.randrange(4)
    middle = ["", word[i] * 2, draw.choice("abcdefghijklmnopqrstuvwxyz_"), word[i + 1] + word[i]][how]
    return word[:i] + middle + word[i + (2 if how == 3 else 1) :]


def test_of_500_misspelt_keys_nearly_all_are_guessed() -> None:
    draw, keys = random.Random(8), [path for path, _ in walk(StackWiseConfig) if "N" not in path]
    names, told, right = {part for path in keys for part in path}, 0, 0
    while told < 500:
        path = draw.choice(keys)
        wrong = (*path[:-1], misspelt(str(path[-1]), draw))
        if wrong[-1] in names:
            continue
        told += 1
        right += nearest_key(StackWiseConfig, wrong) == f"did you mean {dotted(path)!r}?"
    assert right >= 0.95 * told, right


def test_maps_by_number_are_read_and_written(tmp_path):
    text = "training: {progressive: {time_step_mask_fractions: {0: 0.5, 2: 0.1}, building_mode: independent, time_interpretation: depth}}"
    config = StackWiseConfig(**parse(text, "").data)
    assert config.training.progressive.time_step_mask_fractions == {0: 0.5, 2: 0.1}
    again = StackWiseConfig(**parse(dump(config.to_dict()), "").data)
    assert again == config
    with pytest.raises(ConfigError, match="time_step_mask_fractions: wrong value"):
        read(tmp_path, "training: {progressive: {time_step_mask_fractions: {-1: 0.5}}}")


def test_texts_that_look_like_numbers_are_written_in_quotes():
    for text in ("1e-4", "1e5", "true", "null", "~", "", "0x1f", ".5", "12", "1_000", "yes", "2020-01-01"):
        assert parse(dump({"key": text}), "f").data == {"key": text}


def test_to_dict_is_deep_and_ready_for_json():
    config = StackWiseConfig()
    data = config.to_dict()
    assert json.loads(json.dumps(data)) == data
    data["training"]["optimizer"]["betas"][0] = 0.0
    assert config.training.optimizer.betas[0] == 0.9
    assert StackWiseConfig.from_dict(config.to_dict()) == config


def test_from_dict_leaves_its_argument_alone():
    data = {"model": {"architecture": None}, "training": {"optimizer": {"betas": [0.8, 0.9]}}}
    config = StackWiseConfig.from_dict(data)
    config.training.optimizer.betas = [0.1, 0.2]
    assert data == {"model": {"architecture": None}, "training": {"optimizer": {"betas": [0.8, 0.9]}}}
    with pytest.raises(TypeError, match="mapping"):
        StackWiseConfig.from_dict(["model"])  # type: ignore[arg-type]


def test_two_configurations_share_nothing():
    one, other = StackWiseConfig(), StackWiseConfig()
    one.training.optimizer.custom_params["nesterov"] = True
    one.generation.stop.append("\n")
    assert other.training.optimizer.custom_params == {}
    assert other.generation.stop == []


# Keys that rules join, each with combinations that the rules allow; all others are drawn freely.
JOINED = {
    "model": [
        {"d_model": 96, "n_heads": 6, "n_kv_heads": 3, "max_seq_len": 4096},
        {"attention_preset": "efficient_gqa", "attention_overrides": {"attention_mode": "causal"}},
        {"attention_preset": "custom", "attention_custom": {"attention_mode": "causal", "qk_norm": True}},
        {"pos_encoding": "learned", "norm_placement": "post"},
        {"pos_encoding": "sinusoidal", "use_rope": False, "freeze_up_proj": True},
        {"use_rope": False, "ffn_type": "gelu"},
        {"architecture": {"n_stacks": 3, "blocks_per_stack": 2}, "attention_custom": {}},
    ],
    "training": [
        {"residency": "streamed", "compile": False, "dtype": "bfloat16"},
        {"compile": False, "dtype": "float32", "progressive": {"trunk_residency": "mapped"}},
    ],
    "training.progressive": [
        {"max_stacks": 6, "target_stacks": 5, "stage_weights": [1, 2, 3.5, 4, 5]},
        {"enabled": False, "new_stack_init": "zero"},
        {"joint_tuning": False},
        {
            "qlora_enabled": True,
            "progressive_qlora": True,
            "qlora_strategy": "variable",
            "trunk_strategy": "qlora",
            "joint_tuning_backbone": "qlora",
        },
        {
            "qlora_enabled": True,
            "progressive_qlora": True,
            "qlora_method": "mora",
            "trunk_lora_mode": "merge",
        },
    ],
    "training.optimizer": [
        {"optimizer_type": "Muon", "memory": "int8"},
        {"memory": "int8_nomaster"},
        {"optimizer_type": "RAdam"},
        {"optimizer_type": "my.own_module:Optimizer1"},
    ],
    "data": [{"source": "text", "path": "a*.txt"}, {"source": "jsonl", "path": ["a", "b c"]}],
}
TAKEN = {
    *("optimizer_type", "memory"),
    *(
        "d_model",
        "n_heads",
        "n_kv_heads",
        "max_seq_len",
        "attention_preset",
        "attention_overrides",
        "attention_custom",
    ),
    *("pos_encoding", "use_rope", "norm_placement", "freeze_up_proj", "ffn_type", "architecture", "seq_len"),
    *(
        "max_stacks",
        "target_stacks",
        "stage_weights",
        "enabled",
        "new_stack_init",
        "joint_tuning",
        "source",
        "path",
    ),
    *("qlora_enabled", "progressive_qlora", "trunk_lora_mode", "trunk_strategy", "joint_tuning_backbone"),
    *("residency", "trunk_residency"),
    # Lists of sections whose rules join many keys; tests/curriculum has them.
    *("stacks", "stages", "train_stacks", "growth_factor", "growth_layers"),
}
PATTERNED = {
    "run_id": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", fullmatch=True),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "mps"]),
    "qlora_configs": st.dictionaries(
        st.integers(0, 12),
        st.fixed_dictionaries(
            {"rank": st.integers(1, 9), "alpha": st.floats(0.5, 9)}, optional={"dropout": st.floats(0, 0.5)}
        ),
        max_size=3,
    ),
    "sinks": st.lists(st.sampled_from(["csv", "tensorboard", "trackio", "wandb"]), unique=True),
    "match": st.sampled_from(["embedding", r"stacks\.s0\..*", "(a|b)$"]),
    "custom_params": st.dictionaries(
        st.sampled_from(["nesterov", "amsgrad", "ns_steps", "odd key: é"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=6,
        ),
    ),
}


def value(option: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Any value the alternative of a type accepts."""
    least = next((c.ge if isinstance(c, Ge) else c.gt for c in metadata if isinstance(c, Ge | Gt)), None)
    most = next((c.le if isinstance(c, Le) else c.lt for c in metadata if isinstance(c, Le | Lt)), None)
    if option is type(None):
        return st.none()
    if get_origin(option) is Literal:
        return st.sampled_from(get_args(option))
    for constraint in metadata:
        if isinstance(constraint, OneOf):
            return st.sampled_from(list(constraint.names))
    if option is bool:
        return st.booleans()
    if option is int:
        return st.integers(least, most - 1 if most is not None else None)
    if option is float:
        outer = {type(c) for c in metadata}
        return st.floats(
            least,
            most,
            exclude_min=Gt in outer,
            exclude_max=Lt in outer,
            allow_nan=False,
            allow_infinity=False,
        )
    shortest = next((c.min_length for c in metadata if isinstance(c, MinLen)), 0)
    if option is str:
        return st.text(min_size=shortest)
    if get_origin(option) is dict:
        keys, values = (one_of_alternatives(part, []) for part in get_args(option))
        return st.dictionaries(keys, values, max_size=3)
    longest = next((c.max_length for c in metadata if isinstance(c, MaxLen)), 3)
    item = get_args(option)[0]
    if section_of(item):
        return st.lists(section(item), max_size=2)
    return st.lists(one_of_alternatives(item, []), min_size=shortest, max_size=longest)


def one_of_alternatives(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    return st.one_of([value(*part) for part in alternatives(annotation, metadata)])


def section(cls: type[BaseModel], key: str = "") -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of a section's keys with values they accept, over one of the joined combinations."""
    parts: dict[str, st.SearchStrategy[Any]] = {}
    required = {}
    for name, field in cls.model_fields.items():
        if name in TAKEN:
            continue
        if name in PATTERNED:
            strategy = PATTERNED[name]
        elif inner := section_of(field.annotation):
            strategy = section(inner, f"{key}.{name}".lstrip("."))
        else:
            strategy = one_of_alternatives(field.annotation, list(field.metadata))
        (required if field.is_required() or name == "vocab_size" else parts)[name] = strategy
        assert item_section_of(field.annotation) is None or name in ("groups", *TAKEN)
    joined = st.sampled_from([{}, *JOINED.get(key, [])])
    free = st.fixed_dictionaries(required, optional=parts)
    return st.tuples(free, joined).map(lambda pair: pair[0] | pair[1])


def with_complete_groups(data: dict[str, Any]) -> dict[str, Any]:
    for group in data.get("training", {}).get("optimizer", {}).get("groups", []):
        group["lr"] = group.get("lr") or 1.0
    return data


@settings(
    deadline=None,
    max_examples=60,
    # Half of what is drawn breaks a rule between keys, and in a bad draw more of it.
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(data=section(StackWiseConfig).map(with_complete_groups))
def test_any_configuration_survives_yaml(tmp_path, data):
    assume(
        not broken_rules(StackWiseConfig.model_validate(data), {})
    )  # keys of distant sections that disagree
    config = StackWiseConfig.from_dict(data)
    config.to_yaml(tmp_path / "c.yaml")
    again = StackWiseConfig.from_yaml(tmp_path / "c.yaml")
    assert again == config
    assert again.notes() == config.notes()

    resolved, _ = resolve(config)
    resolved.to_yaml(tmp_path / "r.yaml")
    assert StackWiseConfig.from_yaml(tmp_path / "r.yaml") == resolved
    assert resolve(resolved) == (resolved, [])


words = st.sampled_from(
    ["model", "training", "data", "base", "optimizer", "groups", "d_model", "match", "n_blocks", "x"]
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


def error_of(read: Callable[[], Any]) -> ConfigError | None:
    try:
        read()
    except ConfigError as error:
        return error
    return None


@settings(deadline=None, max_examples=150)
@given(data=st.dictionaries(words | st.integers(), junk, max_size=4))
def test_any_nested_map_is_a_configuration_or_a_config_error(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        error = error_of(lambda: StackWiseConfig.from_dict(data))
    assert error is None or len(str(error).splitlines()) >= len(error.problems) > 0


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_config_error(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("utf-8"))
    error = error_of(lambda: StackWiseConfig.from_yaml(path))
    assert error is None or str(path) in str(error)


@settings(deadline=None, max_examples=100)
@given(
    key=st.sampled_from([row.key for row in schema_rows() if row.key != "base"]), text=st.text(max_size=12)
)
def test_any_override_is_read_or_a_config_error(key, text):
    document = Document()
    apply_overrides(document, [f"{key}={text}"], StackWiseConfig)
    error = error_of(lambda: StackWiseConfig.from_dict(document.data))
    assert error is None or error.problems
