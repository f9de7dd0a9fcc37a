"""The header pass: what is no plain safetensors file is refused by name, before a tensor is read."""

from __future__ import annotations

import json
import os
import random
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from stackwise.storage import header
from stackwise.storage.errors import DamagedFileError, UnsafeInputError
from stackwise.storage.header import parse_header, read_header

GOOD: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND: dict[str, Any] = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}


def file_of(fields: object, data: bytes = bytes(8)) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


def twice(name: str) -> bytes:
    entry = json.dumps(GOOD)
    return f'{{"{name}":{entry},"{name}":{entry}}}'.encode()


UNSAFE: dict[str, tuple[bytes, str]] = {
    "a tensor twice": (file_of(twice("a")), "'a' is given twice"),
    "a field twice": (file_of(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
    "metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}', b""), "twice"),
    "a field that is not known": (file_of({"a": {**GOOD, "code": "x"}}), "exactly dtype"),
    "a field that is missing": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "exactly dtype"),
    "a tensor that is a number": (file_of({"a": 1}), "exactly dtype"),
    "a tensor that is null": (file_of({"a": None}), "exactly dtype"),
    "a header that is a list": (file_of([GOOD]), "not a JSON object"),
    "a header that is a text": (file_of("a"), "not a JSON object"),
    "metadata that is no map": (file_of({"__metadata__": []}, b""), "__metadata__"),
    "metadata with numbers": (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "metadata in metadata": (file_of({"__metadata__": {"a": {"b": "c"}}}, b""), "__metadata__"),
    "brackets without end": (file_of(b'{"a":' + b"[" * 100_000), "plain JSON"),
    "a number of many digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "plain JSON"),
    "an impossible length": ((2**62).to_bytes(8, "little") + b"{}", "bytes, 16777216 at most"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "torch.save"),
    "a pickle": (b"\x80\x05\x95" + bytes(5) + b"\xffrest", "a pickle"),
    "a NumPy file": (b"\x93NUMPY\x01\x00v\x00{'descr'", "NumPy"),
    "a gzip file": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "gzip"),
    **{
        f"the name {name!r}": (file_of({name: GOOD}), "only letters")
        for name in ("../a", "a/../b", "", "a b", "a\x00", "a\x1b[2J", "a\nb", "ä", "a\\b", "a" * 513, "\u202ea", "..")
    },
    **{
        f"the dtype {dtype!r}": (file_of({"a": {**GOOD, "dtype": dtype}}), "unknown dtype")
        for dtype in ("F31", "f32", "", None, 3, ["F32"], {"F32": 1}, "F32 ")
    },
    **{
        f"the shape {shape!r}": (file_of({"a": {**GOOD, "shape": shape}}), "impossible shape")
        for shape in ([-2], [2.0], [True, 2], ["2"], [None], "2", 2, None, {"0": 2}, [[2]], [1] * 9, [2**31 + 1, 0])
    },
    **{
        f"the offsets {offsets!r}": (file_of({"a": {**GOOD, "data_offsets": offsets}}), "offsets")
        for offsets in ([-8, 0], [0.0, 8.0], [0], [0, 8, 8], None, "08", [True, 9], [[0, 8]])
    },
    "offsets in reverse": (file_of({"a": {**GOOD, "data_offsets": [8, 0]}}), "do not fit"),
    "a size that does not fit": (file_of({"a": {**GOOD, "shape": [3]}}), "do not fit"),
    "a size beyond 64 bits": (file_of({"a": {**GOOD, "shape": [2**31] * 8}}), "do not fit"),
    "a hole": (file_of({"a": GOOD, "b": {**SECOND, "data_offsets": [9, 12]}}, bytes(12)), "expected 8"),
    "a hole at the start": (file_of({"a": {**GOOD, "data_offsets": [8, 16]}}, bytes(16)), "expected 0"),
    "an overlap": (file_of({"a": GOOD, "b": {**SECOND, "data_offsets": [7, 10]}}, bytes(11)), "expected 8"),
    "two tensors in one place": (file_of({"a": GOOD, "b": GOOD}), "expected 8"),
}  # fmt: skip
DAMAGED: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "too few"),
    "seven bytes": (bytes(7), "too few"),
    "a header that is cut short": (file_of({"a": GOOD})[:30], "does not fit"),
    "bytes that are missing": (file_of({"a": GOOD}, bytes(7)), "end at byte 8, the file holds 7"),
    "bytes that are too many": (file_of({"a": GOOD}, bytes(9)), "end at byte 8, the file holds 9"),
    "no JSON": (file_of(b'{"a":'), "not JSON"),
    "an empty header": (file_of(b""), "not JSON"),
    "blanks alone": (file_of(b"        "), "not JSON"),
    "no UTF-8": (file_of(b'{"\xff":1}'), "not JSON"),
    "zeros behind the JSON": (file_of(json.dumps({"a": GOOD}).encode() + b"\0\0"), "not JSON"),
}


def test_there_are_sixty_cases_by_hand() -> None:
    assert len(UNSAFE) + len(DAMAGED) >= 60


@pytest.mark.parametrize("case", UNSAFE)
def test_what_is_not_safe_is_refused(case: str, tmp_path: Path) -> None:
    data, says = UNSAFE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UnsafeInputError, match=re.escape(says)) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_not_whole_is_damaged(case: str, tmp_path: Path) -> None:
    data, says = DAMAGED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=re.escape(says)) as caught:
        read_header(path)
    assert caught.value.exit_code == 3


def test_files_of_other_programs_pass(tmp_path: Path) -> None:
    """Unaligned tensors, many metadata keys, no padding, dtypes that are not stored here."""
    fields = {
        "__metadata__": {f"key {i}": "any text \x1b" for i in range(9)},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [1, 9]},
        "c": {"dtype": "U16", "shape": [], "data_offsets": [9, 11]},
        "f4": {"dtype": "F4", "shape": [4], "data_offsets": [11, 13]},
        "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [13, 13]},
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(fields, bytes(13)))
    found = read_header(path)
    assert list(found.rows) == ["b", "a.weight", "c", "f4", "empty"]
    assert found.rows["a.weight"] == ("a.weight", "F32", (2, 1), 1, 9)
    assert len(found.metadata) == 9
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(found.rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"b": {**SECOND, "data_offsets": [0, 3]}, "a": {**GOOD, "data_offsets": [3, 11]}},
        {"a": {**GOOD, "dtype": "U32"}},
    ],
    ids=["not aligned", "a dtype that is never stored"],
)
def test_objects_of_a_store_are_held_to_more(fields: dict[str, Any]) -> None:
    text = json.dumps(fields).encode()
    size = max((row["data_offsets"][1] for name, row in fields.items() if name != "__metadata__"), default=0)
    parse_header(text, size, foreign=True)
    with pytest.raises(UnsafeInputError):
        parse_header(text, size)


FIELDS: dict[str, list[Any]] = {
    "dtype": ["F64", "U8", "BOOL", "x", None, 0],
    "shape": [[], [0], [1], [2, 1], [4], [-1], [2**33], "2", [1] * 9],
    "data_offsets": [[0, 0], [0, 4], [4, 12], [8, 8], [8, 0], [0, 2**63], [0, -8], [0]],
    "extra": [1],
}


def test_all_changes_of_two_fields_leave_nothing_that_the_library_refuses(tmp_path: Path) -> None:
    """Whatever passes here is also a file for the library: our rules are the narrower ones."""
    changes = [(key, value) for key, values in FIELDS.items() for value in values]
    path, passed = tmp_path / "x.safetensors", 0
    for i, (key, value) in enumerate(changes):
        for other, change in changes[i:]:
            data = file_of({"a": {**GOOD, key: value, other: change}, "b": SECOND}, bytes(11))
            path.write_bytes(data)
            try:
                read_header(path)
            except (UnsafeInputError, DamagedFileError):
                continue
            passed += 1
            try:
                with safe_open(path, "pt") as opened:
                    opened.keys()
            except SafetensorError as error:
                raise AssertionError(data) from error
    assert passed > 0


@pytest.mark.parametrize("kind", ["tensors", "numbers", "metadata", "length"])
def test_a_bomb_is_refused_before_it_grows(kind: str, tmp_path: Path) -> None:
    """64 MB at most, whatever a header of up to 67 MB asks for."""
    empty = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(200_000))
    text = {
        "tensors": f"{{{empty}}}"[: header.MAX_HEADER],
        "numbers": '{"a":{"dtype":"U8","shape":[' + "0," * 7_000_000 + '0],"data_offsets":[0,0]}}',
        "metadata": '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(1_200_000)) + "}}",
        "length": " " * 67_000_000,
    }[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(text.encode(), b""))
    tracemalloc.start()
    with pytest.raises(UnsafeInputError, match=r"100000 tensors|at most"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_links_pipes_devices_and_folders_are_not_opened(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(file_of({"a": GOOD}))
    (tmp_path / "link").symlink_to(good)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    before = time.monotonic()
    for name in ("link", "pipe", "folder", "device"):
        with pytest.raises(UnsafeInputError, match=f"{name} is (a link|no regular file)"):
            read_header(tmp_path / name)
    with pytest.raises(UnsafeInputError, match="no regular file"):
        read_header(Path("/dev/zero"))
    assert time.monotonic() - before < 60, "a pipe was waited for"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_header(tmp_path / "nowhere")
    assert read_header(good).rows.keys() == {"a"}


def test_links_of_the_hub_cache_lead_to_its_own_blobs_alone(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "blobs" / "f00").write_bytes(file_of({"a": GOOD}))
    (tmp_path / "secret").write_bytes(file_of({"s": GOOD}))
    link = model / "snapshots" / "abc" / "model.safetensors"
    link.symlink_to("../../blobs/f00")
    assert read_header(link).rows.keys() == {"a"}
    for target in ("../../../secret", str(tmp_path / "secret"), "../../blobs/out"):
        link.unlink()
        link.symlink_to(target)
        (model / "blobs" / "out").unlink(missing_ok=True)
        (model / "blobs" / "out").symlink_to(tmp_path / "secret")
        with pytest.raises(UnsafeInputError, match="a link"):
            read_header(link)


def test_any_change_of_a_byte_is_accepted_or_refused_by_a_typed_error() -> None:
    draw = random.Random(20)
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": GOOD, "b": SECOND}).encode()
    outcomes = {"passed": 0, "refused": 0}
    for _ in range(3000):
        data = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            parse_header(bytes(data), 11, foreign=True)
        except (UnsafeInputError, DamagedFileError):
            outcomes["refused"] += 1
        else:
            outcomes["passed"] += 1
    assert min(outcomes.values()) > 20
