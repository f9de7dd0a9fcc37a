"""Descriptions from elsewhere: bounded, plain JSON, in regular files."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackwise.storage.errors import DamagedFileError, UnsafeInputError
from stackwise.storage.regular import PICKLES, check_file_name, read_json, refuse_pickles


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is given twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no plain JSON"),
        (b'{"a":' * 100_000, "no plain JSON"),
    ],
)
def test_what_readers_take_in_different_ways_is_not_safe(text: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(UnsafeInputError, match=says) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff{}", b"[1]", b"null", b'{"a": 1}x'])
def test_what_is_no_object_is_damaged(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(DamagedFileError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": "%s"}' % (b"x" * 100))
    assert read_json(tmp_path / "x.json", 200)["a"] == "x" * 100
    with pytest.raises(UnsafeInputError, match="larger than 50 bytes"):
        read_json(tmp_path / "x.json", 50)


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/b", "a\\b", "", ".", "..", "a b", "a\n", "ä", "a\0", 3, None, "x" * 256, "%2e%2e"],
)
def test_names_that_could_lead_out_of_the_folder(name: object) -> None:
    with pytest.raises(UnsafeInputError, match="no file of the folder"):
        check_file_name(name, "index.json")


@pytest.mark.parametrize("ending", PICKLES)
def test_pickles_are_named_and_left_alone(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"w{ending}").write_bytes(b"\x80\x05cposix\nsystem\n")
    with pytest.raises(UnsafeInputError, match=f"w{ending}, a pickle"):
        refuse_pickles(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").touch()
    refuse_pickles(tmp_path, "model.safetensors")
