"""Text files and prepared corpora that are damaged or made to do harm: a typed error with file and place."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise.data import sources
from stackwise.data.corpus import Corpus, TokenSplit
from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.packing import make_rows
from stackwise.data.prepare import prepare
from stackwise.data.settings import DataSettings
from stackwise.storage.errors import UnsafeInputError

BAD_TEXT: list[tuple[str, str, bytes, str]] = [
    ("text", "a zero byte", b"good\ngood\x00bad", r"x: byte 9: a zero byte"),
    ("text", "UTF-16", "text".encode("utf-16"), r"x: byte 0: 0xff"),
    ("text", "UTF-16 without a mark", "text".encode("utf-16-le"), r"x: byte 1: a zero byte.*utf-16"),
    ("text", "gzip", gzip.compress(b"text"), "a compressed file; unpack it first"),
    ("text", "zip", b"PK\x03\x04rest", "a compressed file"),
    ("text", "an overlong spelling", b"ab\xc0\x80", r"byte 2: 0xc0"),
    ("text", "a surrogate", b"ab\xed\xa0\x80", r"byte 2: 0xed"),
    ("text", "cut in a character", "abc é".encode()[:-1], r"byte 4: 0xc3.*unexpected end"),
    ("text", "nothing", b"", "the training text is empty"),
    ("jsonl", "nothing", b"", "the training text is empty"),
    ("jsonl", "blank lines", b"\n  \n\n", "the training text is empty"),
    ("jsonl", "a zero byte", b'{"text": "a"}\n{"text": "\x00"}\n', r"x: byte 24: a zero byte"),
    ("jsonl", "half a line", b'{"text": "a"}\n{"text": "b', r"x:2: this line is not JSON"),
    ("jsonl", "brackets without end", b'{"text": ' + b"[" * 100_000, r"x:1: this line is not JSON"),
    ("jsonl", "a number of many digits", b'{"text": ' + b"9" * 5000 + b"}", r"x:1: this line is not JSON"),
    ("jsonl", "a list", b"[1]\n", r"x:1: this row is"),
    ("jsonl", "a number for text", b'{"text": 3}\n', "is 3, not text"),
    ("jsonl", "half a surrogate pair", b'{"text": "\\ud800"}\n', r"x:1.*surrogate"),
]


@pytest.mark.parametrize(
    ("kind", "name", "data", "says"), BAD_TEXT, ids=[f"{k} {n}" for k, n, _, _ in BAD_TEXT]
)
def test_text_that_cannot_be_used(kind: Any, name: str, data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    settings = DataSettings(source=kind, path=str(tmp_path / "x"), tokenizer="byte")
    with pytest.raises(DataError, match=says):
        prepare(settings, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_line_above_the_limit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b'{"text": "%s"}\n' % (b"y" * 2000))
    settings = DataSettings(source="jsonl", path=str(path), tokenizer="byte")
    with pytest.raises(DataError, match=r"x\.jsonl:2, byte 14: this line has more than 1,000 bytes"):
        prepare(settings, tmp_path / "cache")


@pytest.mark.parametrize("data", [b'{"text": "a"}\n{"text": "b"}', b'{"text": "a"}\r\n{"text": "b"}\r\n'])
def test_a_last_line_without_its_end_counts(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    settings = DataSettings(source="jsonl", path=str(tmp_path / "x"), tokenizer="byte", eval_fraction=0.5)
    corpus = prepare(settings, tmp_path / "cache")
    assert corpus.train.n_documents + corpus.validation.n_documents == 2


@pytest.mark.parametrize("kind", ["pipe", "folder", "nowhere"])
def test_what_is_no_file_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises((DataError, FileNotFoundError), match=r"data\.path"):
        prepare(DataSettings(source="text", path=str(path)), tmp_path / "cache")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rows = "".join(json.dumps({"text": "the cat sat on the mat " * (i + 1)}) + "\n" for i in range(12))
    (tmp_path / "x.jsonl").write_text(rows)
    settings = DataSettings(source="jsonl", path=str(tmp_path / "x.jsonl"), tokenizer="char")
    return prepare(settings, tmp_path / "cache")


def damage(corpus: Corpus, file: str, change: Callable[[np.ndarray], None], dtype: str) -> Corpus:
    path = corpus.folder / file
    array = np.fromfile(path, dtype)
    change(array)
    path.write_bytes(array.tobytes())
    return Corpus.open(corpus.folder)


@pytest.mark.parametrize("packing", [True, False])
def test_an_id_outside_is_found_before_it_is_looked_up(packing: bool, corpus: Corpus) -> None:
    at = 77
    hurt = damage(corpus, "train.bin", lambda ids: ids.__setitem__(at, 60_000), "<u2")
    hurt.train.check_vocabulary(100)  # its manifest says nothing of it
    rows = make_rows(hurt.train, 16, packing=packing)
    with pytest.raises(DamagedDataError, match=r"train\.bin: token 77, at byte 154, is id 60000") as caught:
        rows.batch(np.arange(rows.n_rows))
    assert "prepare the data again" in str(caught.value)


def test_a_next_id_outside_is_found_too(corpus: Corpus) -> None:
    hurt = damage(corpus, "train.bin", lambda ids: ids.__setitem__(16, 60_000), "<u2")
    with pytest.raises(DamagedDataError, match="token 16, at byte 32"):
        make_rows(hurt.train, 16).batch(np.array([0]))


@pytest.mark.parametrize("value", [-1, 2**40, 0, -(2**62), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("packing", [True, False])
def test_documents_that_start_anywhere_are_found(value: int, packing: bool, corpus: Corpus) -> None:
    hurt = damage(corpus, "train.documents.bin", lambda starts: starts.__setitem__(3, value), "<i8")
    with pytest.raises(DamagedDataError, match=r"train\.documents\.bin: document [34], at byte"):
        make_rows(hurt.train, 16, packing=packing)


def test_documents_in_memory_are_held_to_the_same() -> None:
    with pytest.raises(DamagedDataError, match="the train split: document 0"):
        make_rows(TokenSplit.from_arrays(np.arange(40), [5, 9]), 8)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dtype",), "O"),
        (("dtype",), "<f8"),
        (("dtype",), ["<u2"]),
        (("dtype",), None),
        (("splits", "train", "tokens"), -5),
        (("splits", "train", "tokens"), 2**70),
        (("splits", "train", "tokens"), "12"),
        (("splits", "train", "documents"), True),
        (("splits", "train", "max_id"), 1.5),
        (("splits", "train"), []),
        (("splits",), None),
        (("tokenizer",), "byte"),
        (("format",), ["stackwise-corpus"]),
        (("version",), 99),
    ],
)
def test_a_manifest_that_says_something_impossible(path: tuple[str, ...], value: Any, corpus: Corpus) -> None:
    file = corpus.folder / "manifest.json"
    manifest = json.loads(file.read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(DamagedDataError, match=r"manifest\.json: this is not the manifest"):
        Corpus.open(corpus.folder)


def test_a_corpus_reads_no_file_outside_of_its_folder(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes((corpus.folder / "train.bin").read_bytes())
    (corpus.folder / "train.bin").unlink()
    (corpus.folder / "train.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInputError, match=r"train\.bin is a link"):
        Corpus.open(corpus.folder)
    (corpus.folder / "train.bin").unlink()
    os.mkfifo(corpus.folder / "train.bin")
    with pytest.raises(UnsafeInputError, match="no regular file"):
        Corpus.open(corpus.folder)
