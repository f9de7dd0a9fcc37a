"""Every key described, and the shipped configurations."""

import re

import pytest

from stackwise import StackWiseConfig
from stackwise.config.presets import FOLDER, preset_names
from stackwise.config.resolve import resolve
from stackwise.config.schema import SchemaRow, schema_rows
from stackwise.config.shape import walk

ROWS = {row.key: row for row in schema_rows()}


def test_every_key_has_type_default_allowed_values_and_help():
    for row in ROWS.values():
        assert row.type, row
        assert row.default, row
        assert row.allowed, row
        assert re.fullmatch(r"[^\n]{12,}[.;]?", row.help), row
        assert row.help.endswith("."), row


def test_every_section_has_help():
    assert all(field.description for _, field in walk(StackWiseConfig))


def test_rows_say_what_a_key_accepts():
    assert ROWS["model.d_ff"][1:4] == ("int?", "null", "whole number >= 1, null")
    assert ROWS["model.dropout"][1:4] == ("float", "0.0", "number >= 0 and < 1")
    assert ROWS["training.loss_chunk_tokens"][1:4] == ("str | int", "'auto'", "auto, whole number >= 1")
    assert ROWS["training.compile"][1:4] == ("bool", "false", "true, false")
    assert ROWS["data.path"][1:4] == ("str | list?", "null", "text, list of at least 1 of: text, null")
    assert ROWS["training.optimizer.groups.N.match"][1:4] == ("str", "required", "regular expression")
    assert ROWS["training.optimizer.groups.N.match"] == SchemaRow(*ROWS["training.optimizer.groups.N.match"])


def test_a_null_default_is_explained():
    for row in ROWS.values():
        if row.default == "null" and not row.key.startswith(("base", "data.path")):
            assert "null" in row.help or ".attention_" in row.key, row


def test_rows_are_unique_and_cover_the_tree():
    keys = [row.key for row in schema_rows()]
    assert len(keys) == len(set(keys)) > 100
    assert keys[0] == "base"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_without_notes_and_resolves(name):
    config = StackWiseConfig.from_yaml(name)
    assert config.notes() == []
    resolve(config, vocab_size=50)[0].validate()


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_and_runs_under_its_own_name(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert StackWiseConfig.from_yaml(name).training.run_id == name
