"""What is printed cannot drive a terminal or tell a secret, and folders of others are told or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stackwise.cli.main import main
from stackwise.cli.output import print_json, print_table, watch_folders
from stackwise.config.errors import ConfigError, Problem, is_secret, masked
from stackwise.config.schema import schema_rows
from stackwise.storage.errors import UnsafeInputError
from stackwise.storage.regular import folder_risks

EVIL = ["\x1b[2J", "\x9b31m", "\x07", "\r", "\x7f", "\u202e", "\x1b]0;title\x07", "\x00"]


def test_the_exit_code_of_unsafe_input_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert UnsafeInputError.exit_code == 8
    assert main(["--help"]) == 0
    assert "8 unsafe input" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("evil", [e for e in EVIL if "\0" not in e])
def test_names_of_files_cannot_drive_a_terminal(evil: str, cli, tmp_path: Path) -> None:
    path = tmp_path / f"a{evil}b.yaml"
    path.write_text("model: {d_model: -1}")
    for words in (["config", "validate", str(path)], ["generate", str(path)], ["train", str(path) + "x"]):
        result = cli(*words)
        assert result.code == 2
        assert not set(result.err + result.out) & set(evil) - set("[]J0;title321m")


@pytest.mark.parametrize("evil", EVIL)
def test_tables_json_and_notes_show_control_characters(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    print_table(evil and "", ["name", "n"], [[f"a{evil}b", "1"]], caption=evil)
    print_json({"name": f"a{evil}é"})
    out = capsys.readouterr().out
    assert "é" in out
    assert not set(out) & (set(evil) - set("[]J0;title321m"))
    start = out.index("{")
    assert json.loads(out[start:])["name"] == f"a{evil}é"


@pytest.mark.parametrize(
    "key",
    ["token", "hub.token", "hf_token", "API_KEY", "apikey", "client-secret", "a.password", "credentials"],
)
def test_secrets_are_hidden(key: str) -> None:
    assert is_secret(key)
    assert "s3cret" not in str(Problem(key, "unknown key", "s3cret"))
    assert "s3cret" not in str(ConfigError([Problem("x", "wrong", {key: ["s3cret"]})]))
    assert masked({"a": [{key: "s3cret", "b": 1}]}) == {"a": [{key: "(hidden)", "b": 1}]}


def test_no_key_of_a_configuration_is_taken_for_a_secret() -> None:
    assert [row.key for row in schema_rows() if is_secret(row.key)] == []
    for key in (
        "tokenizer",
        "batch_tokens",
        "mask_token_id",
        "objective.add_mask_token",
        "secretary",
        "keys",
    ):
        assert not is_secret(key)


def test_secrets_are_not_shown_with_a_configuration(cli, folder: Path) -> None:
    shown = cli("config", "show", "tiny.yaml", "training.optimizer.custom_params={api_key: s3cret, a: 1}")
    assert "s3cret" not in shown.out
    assert "(hidden)" in shown.out


@pytest.fixture
def private(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir(mode=0o700)
    return path


def test_a_folder_of_ones_own_is_no_risk(private: Path) -> None:
    assert folder_risks(private) == []
    assert folder_risks(private / "nowhere") == []


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_everybody_writes_to(
    mode: int, private: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private.chmod(mode)
    assert "can be written by everybody" in folder_risks(private)[0]
    watch_folders([private, private], strict=False)
    assert capsys.readouterr().err.count("--strict refuses it") == 1
    with pytest.raises(UnsafeInputError, match="can be written by everybody"):
        watch_folders([private], strict=True)


def test_a_link_and_a_folder_of_somebody_else(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = private.parent / "link"
    link.symlink_to(private)
    assert folder_risks(link) == [f"{link} is a link to {private}"]
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to the user" in folder_risks(private)[0]


def test_a_folder_that_a_group_of_others_writes_to(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private.chmod(0o770)
    assert folder_risks(private) == []
    monkeypatch.setattr(os, "getegid", lambda: 12345)
    assert "by the group" in folder_risks(private)[0]


def test_strict_refuses_to_train_and_to_generate(cli, run_folder: Path) -> None:
    run = run_folder / "runs/tiny"
    run.chmod(0o777)
    for words in (["train", "tiny.yaml", "--strict"], ["generate", "tiny", "--strict"]):
        result = cli(*words)
        assert result.code == 8, result.err
        assert "runs/tiny can be written by everybody" in result.err
    assert "note: runs/tiny can be written" in cli("generate", "tiny", "-n", "1").err
    run.chmod(0o755)
    assert cli("generate", "tiny", "-n", "1", "--strict").code == 0
