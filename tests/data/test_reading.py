"""Any text, spelled by a tokenizer that is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stackwise.data.corpus import Corpus
from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.prepare import prepare
from stackwise.data.reading import read_corpus
from stackwise.data.settings import DataSettings
from stackwise.data.tokenizers import ByteTokenizer, CharTokenizer


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in ("one", "", "two words", "é")))
    return path


def test_it_is_spelled_as_in_training(tmp_path: Path, rows: Path) -> None:
    settings = DataSettings(
        source="jsonl", path=str(rows), text_key="body", eval_path=str(rows), tokenizer="byte"
    )
    trained = prepare(settings, tmp_path / "cache")
    corpus = read_corpus(str(rows), trained.tokenizer, text_key="body")
    for split in (corpus.train, corpus.validation):
        assert np.array_equal(split.tokens, trained.validation.tokens)
        assert np.array_equal(split.doc_starts, trained.validation.doc_starts)
        assert split.n_bytes == trained.validation.n_bytes == 14
    assert (
        read_corpus(str(trained.folder), trained.tokenizer).validation.n_tokens == corpus.validation.n_tokens
    )


def test_a_text_file_is_one_document_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("de")
    tokenizer = ByteTokenizer()
    one = read_corpus(str(tmp_path / "a.txt"), tokenizer)
    assert bytes(one.validation.tokens.tolist()) == b"abc"
    both = read_corpus(str(tmp_path / "*.txt"), tokenizer).validation
    assert both.n_documents == 2
    assert both.n_tokens == 7


def test_its_hash_tells_texts_apart_and_not_folders(tmp_path: Path) -> None:
    hashes = []
    for folder, text in (("x", "same"), ("y", "same"), ("z", "another")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(text)
        hashes.append(read_corpus(str(tmp_path / folder / "text.txt"), ByteTokenizer()).hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_cannot_be_read_is_named(tmp_path: Path, rows: Path) -> None:
    tokenizer = CharTokenizer("abc", separated=False)
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.txt").write_text("abcd")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n')
    for name, error, message in (
        ("absent.txt", FileNotFoundError, "--text: there is no file"),
        (".", DataError, "no manifest.json"),
        ("[ar]*[tl]", DataError, "several kinds, jsonl and text"),
        ("empty.txt", DataError, "there is no text in it"),
        ("other.txt", DataError, "'d'"),
        ("rows.jsonl", DataError, "there is no key 'text' (--text-key)"),
        ("broken.jsonl", DamagedDataError, "broken.jsonl:1"),
    ):
        with pytest.raises(error) as caught:
            read_corpus(str(tmp_path / name), tokenizer)
        assert message in str(caught.value)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 20)
    corpus = prepare(DataSettings(source="text", path=str(tmp_path / "a.txt")), tmp_path / "cache")
    assert isinstance(corpus, Corpus)
    with pytest.raises(DataError, match="spelled by another tokenizer"):
        read_corpus(str(corpus.folder), CharTokenizer("abc", separated=False))
