"""The same text gives the same corpus; nothing is lost or held twice between text, shards and splits."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from stackwise.data.corpus import Corpus, TokenSplit
from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.prepare import prepare, train_tokenizer
from stackwise.data.settings import DataSettings


def decoded(corpus, split):
    """The documents of a split, separators taken off."""
    separator = corpus.manifest["tokenizer"]["separator"]
    ids = [part.tolist() for part in np.split(split.tokens, split.doc_starts[1:])] if split.n_tokens else []
    assert all(part[-1] == separator for part in ids if separator is not None)
    return [corpus.tokenizer.decode(part) for part in ids]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} \u00e9\n" for i in range(200)), encoding="utf-8")
    return DataSettings(source="text", path=str(path))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * (1 + i % 7)}) + "\n" for i in range(100)))
    return DataSettings(source="jsonl", path=str(path))


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_preparing_twice_gives_the_same_hash_and_reuses_the_folder(rows, tmp_path, tokenizer):
    rows.tokenizer = tokenizer
    first, second = prepare(rows, tmp_path / "cache"), prepare(rows, tmp_path / "cache")
    elsewhere = prepare(rows, tmp_path / "other")
    assert (first.reused, second.reused, elsewhere.reused) == (False, True, False)
    assert first.hash == second.hash == elsewhere.hash
    assert first.folder == second.folder
    for file in first.folder.iterdir():
        assert (elsewhere.folder / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


def test_the_hash_follows_everything_that_shapes_the_corpus(rows, tmp_path):
    hashes = [prepare(rows, tmp_path / "cache").hash]
    for change in ({"tokenizer": "char"}, {"eval_fraction": 0.2}, {"max_bytes": 500}):
        hashes.append(prepare(rows.model_copy(update=change), tmp_path / "cache").hash)
    path = Path(rows.path)
    path.write_text(path.read_text().replace("document 3 ", "Document 3 "))
    hashes.append(prepare(rows, tmp_path / "cache").hash)
    assert len(set(hashes)) == 5


def test_several_documents_are_split_by_document_and_lose_nothing(rows, tmp_path):
    corpus = prepare(rows, tmp_path / "cache")
    train, held = decoded(corpus, corpus.train), decoded(corpus, corpus.validation)
    expected = [f"document {i} " * (1 + i % 7) for i in range(100)]
    assert sorted(train + held) == sorted(expected)
    assert train == [text for text in expected if text not in held]
    share = corpus.validation.n_bytes / (corpus.train.n_bytes + corpus.validation.n_bytes)
    assert share == pytest.approx(0.1, abs=0.02)
    # spread over the source: not its start or its end
    places = [expected.index(text) for text in held]
    assert min(places) < 20
    assert max(places) > 80
    for split, documents in ((corpus.train, train), (corpus.validation, held)):
        assert split.n_documents == len(documents)
        assert split.n_bytes == sum(len(text.encode()) for text in documents)
        assert split.n_tokens == split.n_bytes + split.n_documents  # bytes, and one separator each


def test_files_that_join_later_do_not_move_the_earlier_ones_between_splits(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} " * 20)
    few = prepare(DataSettings(source="text", path=f"{tmp_path}/[01]?.txt"), tmp_path / "cache")
    all_ = prepare(DataSettings(source="text", path=f"{tmp_path}/*.txt"), tmp_path / "cache")
    assert decoded(few, few.validation) == decoded(all_, all_.validation)[: few.validation.n_documents]


def test_a_single_file_is_split_by_character_with_no_separator(book, tmp_path):
    text = Path(book.path).read_text(encoding="utf-8")
    corpus = prepare(book, tmp_path / "cache")
    cut = int(len(text) * 0.9)
    assert decoded(corpus, corpus.train) == [text[:cut]]
    assert decoded(corpus, corpus.validation) == [text[cut:]]
    assert corpus.manifest["tokenizer"]["separator"] is None
    assert corpus.train.n_bytes == corpus.train.n_tokens == len(text[:cut].encode())


def test_the_classic_character_corpus_has_its_character_set_and_nothing_else(book, tmp_path):
    book.tokenizer = "char"
    text = Path(book.path).read_text(encoding="utf-8")
    corpus = prepare(book, tmp_path / "cache")
    assert corpus.tokenizer.vocab_size == len(set(text))
    assert corpus.tokenizer.eos_id is None
    assert corpus.train.n_tokens == int(len(text) * 0.9)
    assert corpus.train.n_tokens + corpus.validation.n_tokens == len(text)


@pytest.mark.skipif(
    "STACKWISE_DATA" not in os.environ, reason="STACKWISE_DATA names no folder with example data"
)
def test_tinyshakespeare_has_its_65_characters_and_classic_split(tmp_path):
    path = Path(os.environ["STACKWISE_DATA"]) / "tinyshakespeare" / "input.txt"
    corpus = prepare(DataSettings(source="text", path=str(path), tokenizer="char"), tmp_path)
    assert corpus.tokenizer.vocab_size == 65
    assert (corpus.train.n_tokens, corpus.validation.n_tokens) == (1_003_854, 111_540)


def test_an_eval_path_is_the_whole_validation_split(book, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("held out")
    book.eval_path = str(held)
    corpus = prepare(book, tmp_path / "cache")
    assert decoded(corpus, corpus.train) == [Path(book.path).read_text(encoding="utf-8")]
    assert decoded(corpus, corpus.validation) == ["held out"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    corpus = prepare(DataSettings(source="jsonl", path=str(tmp_path / "rows.jsonl")), tmp_path / "cache")
    assert decoded(corpus, corpus.train) + decoded(corpus, corpus.validation) == ["one", "two"]


def test_the_standard_library_is_split_by_file(tmp_path):
    corpus = prepare(DataSettings(max_bytes=300_000), tmp_path)
    names = corpus.manifest["recipe"]["train"]["files"]
    assert corpus.train.n_documents + corpus.validation.n_documents == len(names)
    assert 0.02 < corpus.validation.n_bytes / 300_000 < 0.4


def test_the_manifest_records_text_tokenizer_and_counts(rows, tmp_path):
    corpus = prepare(rows, tmp_path / "cache")
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest == corpus.manifest
    (file,) = manifest["recipe"]["train"]["files"]
    assert file["bytes"] == Path(rows.path).stat().st_size
    assert len(file["sha256"]) == 64
    assert manifest["tokenizer"]["hash"] == corpus.tokenizer.hash
    assert manifest["splits"]["train"]["tokens"] == corpus.train.n_tokens
    assert manifest["dtype"] == "<u2"
    assert str(tmp_path) not in (corpus.folder / "manifest.json").read_text()


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    text = "".join(chr(0x10000 + i) for i in range(66_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    settings = DataSettings(source="text", path=str(tmp_path / "a.txt"), tokenizer="char")
    corpus = prepare(settings, tmp_path / "cache")
    assert corpus.train.tokens.dtype == np.uint32
    assert decoded(corpus, corpus.train) + decoded(corpus, corpus.validation) == [
        text[:59_400],
        text[59_400:],
    ]


def test_a_tokenizer_trained_on_the_training_split_prepares_the_text(rows, tmp_path):
    result = train_tokenizer(rows, 300, tmp_path / "new" / "tokenizer.json")
    byte = prepare(rows, tmp_path / "cache")
    assert (result.n_documents, result.n_bytes) == (byte.train.n_documents, byte.train.n_bytes)
    rows.tokenizer = str(result.path)
    corpus = prepare(rows, tmp_path / "cache")
    assert corpus.tokenizer.hash == result.tokenizer.hash
    assert decoded(corpus, corpus.train) == decoded(byte, byte.train)
    assert corpus.train.n_tokens < byte.train.n_tokens / 2
    with pytest.raises(DataError, match="vocab_size is 10"):
        train_tokenizer(rows, 10, tmp_path / "tokenizer.json")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_that_prepare_at_once_agree(rows, tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        hashes = pool.starmap(_prepared_hash, [(rows, tmp_path / "cache")] * 4)
    assert len(set(hashes)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _prepared_hash(settings, folder):
    return prepare(settings, folder).hash


# what is wrong is said before anything is written


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("text", "", r"a\.txt: the training text is empty"),
        ("jsonl", "\n\n", r"a\.txt: the training text is empty"),
        ("jsonl", '{"text": ""}\n', r"a\.txt: the training text is empty"),
    ],
)
def test_an_empty_corpus_is_refused(tmp_path, source, content, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(DataSettings(source=source, path=str(tmp_path / "a.txt")), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_empty_eval_file_is_refused(book, tmp_path):
    (tmp_path / "held.txt").touch()
    book.eval_path = str(tmp_path / "held.txt")
    with pytest.raises(DataError, match=r"held\.txt: the held-out text is empty; data\.eval_path"):
        prepare(book, tmp_path / "cache")


def test_a_character_that_only_the_validation_text_has_is_named(book, tmp_path):
    (tmp_path / "held.txt").write_text("line \u00fc")
    book.tokenizer, book.eval_path = "char", str(tmp_path / "held.txt")
    with pytest.raises(DataError, match=r"held\.txt: the character '\u00fc' \(U\+00FC\) at position 5"):
        prepare(book, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_preparation_leaves_nothing_and_the_next_one_works(rows, tmp_path):
    path = Path(rows.path)
    good = path.read_text()
    path.write_text(good + "{bad\n")
    with pytest.raises(DamagedDataError, match=r"rows\.jsonl:101"):
        prepare(rows, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    path.write_text(good)
    assert prepare(rows, tmp_path / "cache").train.n_documents > 50


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (
            "train.bin",
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"has \d+ bytes, its manifest says \d+",
        ),
        ("validation.documents.bin", lambda path: path.unlink(), "the file is missing"),
        ("manifest.json", lambda path: path.write_text("{"), "not the manifest of a prepared corpus"),
        ("manifest.json", lambda path: path.write_text('{"format": "other"}'), "not the manifest"),
        ("tokenizer.json", lambda path: path.write_text("{"), "not a tokenizer"),
        (
            "tokenizer.json",
            lambda path: path.write_text(
                '{"format": "stackwise-tokenizer", "version": 1, "kind": "char", "characters": "ab", "separated": true}'
            ),
            "not the tokenizer that was stored here",
        ),
    ],
)
def test_a_damaged_corpus_is_named_by_file(rows, tmp_path, file, damage, message):
    folder = prepare(rows, tmp_path / "cache").folder
    damage(folder / file)
    with pytest.raises(DamagedDataError, match=message) as caught:
        prepare(rows, tmp_path / "cache")
    assert caught.value.where == str(folder / file)


def test_verify_finds_a_changed_byte_that_sizes_cannot_show(rows, tmp_path):
    corpus = prepare(rows, tmp_path / "cache")
    corpus.verify()
    path = corpus.folder / "train.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"train\.bin: has changed since it was written"):
        Corpus.open(corpus.folder).verify()
    with pytest.raises(DamagedDataError, match="delete the folder"):
        prepare(rows, tmp_path / "cache")  # as the next run reads it


def test_ids_outside_a_vocabulary_are_named_by_file_and_position(rows, tmp_path):
    corpus = prepare(rows, tmp_path / "cache")
    corpus.train.check_vocabulary(257)
    with pytest.raises(
        DataError, match=r"train\.bin: token 11 is id 256, outside a vocabulary of 256.*at least 257"
    ):
        corpus.train.check_vocabulary(256)
    with pytest.raises(DataError, match="the train split: token 1 is id 9, outside a vocabulary of 9"):
        TokenSplit.from_arrays([3, 9, 2]).check_vocabulary(9)


def test_a_missing_corpus_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Corpus.open(tmp_path / "none")
