"""Which sets a stack gets, from the settings."""

from __future__ import annotations

import warnings

import pytest

from stackwise import ConfigError, StackWiseConfig
from stackwise.adapters.ranks import rank_of, set_of
from stackwise.model.spec import AdapterSpec


def keys(**values):
    config = StackWiseConfig.from_dict({"training": {"progressive": {"qlora_enabled": True, **values}}})
    return config.training.progressive


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        ("constant", [16, 16, 16]),
        ("increasing", [16, 32, 64, 128]),
        ("decreasing", [16, 8, 4, 2, 1, 1]),
        ("linear", [16, 24, 32]),
    ],
)
def test_ranks_follow_the_pattern_along_the_order_of_building(pattern, ranks):
    settings = keys(qlora_strategy="progressive", qlora_rank_pattern=pattern)
    assert [rank_of(settings, b).rank for b in range(len(ranks))] == ranks
    assert {rank_of(settings, b).alpha for b in range(4)} == {32.0}
    assert {rank_of(keys(qlora_rank_pattern=pattern), b).rank for b in range(4)} == {16}


@pytest.mark.parametrize(
    ("pattern", "alphas"),
    [
        ("constant", [6, 6, 6, 6]),
        ("increasing", [6, 12, 24, 48]),
        ("decreasing", [6, 3, 1.5, 1]),
        ("linear", [6, 22, 38, 54]),
    ],
)
def test_alphas_follow_a_pattern_of_their_own(pattern, alphas):
    settings = keys(qlora_strategy="progressive", qlora_alpha_pattern=pattern, qlora_alpha=6)
    assert [rank_of(settings, b) for b in range(4)] == [(16, alpha, 0.1) for alpha in alphas]


def test_a_rank_that_is_no_power_of_two_stays_whole():
    settings = keys(qlora_strategy="progressive", qlora_rank_pattern="decreasing", qlora_rank=7)
    assert [rank_of(settings, b).rank for b in range(4)] == [7, 3, 1, 1]


def test_variable_reads_a_table_with_keys_of_text_and_numbers():
    table = {"0": {"rank": 4, "alpha": 8}, 2: {"rank": 6, "alpha": 3.5, "dropout": 0.0}}
    settings = keys(qlora_strategy="variable", qlora_configs=table, qlora_dropout=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rank_of(settings, 0) == (4, 8.0, 0.2)
        assert rank_of(settings, 2) == (6, 3.5, 0.0)
    with pytest.warns(UserWarning, match="qlora_configs has no entry 1: .* rank 16 and alpha 32"):
        assert rank_of(settings, 1) == (16, 32.0, 0.2)
    assert rank_of(keys(qlora_configs=table), 0).rank == 16


@pytest.mark.parametrize("strategy", ["simplified", "progressive", "variable"])
def test_an_explicit_rank_wins(strategy):
    settings = keys(qlora_strategy=strategy, qlora_rank_pattern="increasing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rank_of(settings, 3, rank=5, alpha=2.0)[:2] == (5, 2.0)


def test_the_two_sets_are_described_by_the_settings():
    settings = keys(
        qlora_method="dora", qlora_use_rslora=True, qlora_target_modules=["q", "v"], progressive_qlora=True
    )
    assert set_of(settings, "stack", 1) == AdapterSpec("stack", "dora", 16, 32.0, 0.1, ("q", "v"), True)
    assert set_of(settings, "trunk", 1) == AdapterSpec("trunk", "dora", 8, 16.0, 0.1, ("q", "v"), True)
    assert set_of(keys(), "stack", 0) == AdapterSpec("stack", dropout=0.1)
    assert set_of(keys(), "stack", 0, rank=3).rank == 3
    assert set_of(keys(qlora_target_modules=r".*\.q"), "stack", 0).targets == (r".*\.q",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qlora_rank": 0}, "training.progressive.qlora_rank: .*got 0; allowed: whole number >= 1"),
        ({"qlora_alpha": 0}, "training.progressive.qlora_alpha: .*got 0; allowed: number > 0"),
        ({"qlora_dropout": 1.0}, "got 1.0; allowed: number >= 0 and < 1"),
        (
            {"qlora_strategy": "progresive"},
            "allowed: simplified, progressive, variable; did you mean 'progressive'?",
        ),
        ({"qlora_rank_pattern": "falling"}, "allowed: constant, increasing, decreasing, linear"),
        ({"qlora_method": "ia3"}, "allowed: lora, dora, mora, bottleneck"),
        ({"qlora_configs": {"x": {"rank": 1, "alpha": 1}}}, "map of build index, from 0, to"),
        ({"qlora_configs": {"0": {"rank": 0, "alpha": 1}}}, "map of build index, from 0, to"),
        ({"qlora_configs": {"0": {"rank": 2}}}, "map of build index, from 0, to"),
        ({"qlora_target_modules": []}, "text, list of at least 1 of: text"),
        ({"progressive_qlora_rank": 0}, "progressive_qlora_rank: .*got 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        keys(**wrong)


def test_the_table_survives_yaml_and_can_be_overridden(tmp_path):
    file = tmp_path / "c.yaml"
    keys_text = "training:\n  progressive:\n    qlora_enabled: true\n    qlora_strategy: variable\n"
    file.write_text(
        keys_text + "    qlora_configs:\n      0: {rank: 4, alpha: 8}\n      1: {rank: 5, alpha: 9}\n"
    )
    config = StackWiseConfig.from_yaml(file, ["training.progressive.qlora_configs.1.rank=7"])
    assert [rank_of(config.training.progressive, b).rank for b in (0, 1)] == [4, 7]
    config.to_yaml(file)
    assert StackWiseConfig.from_yaml(file) == config
