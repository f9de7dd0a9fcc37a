"""A tokenizer gives back the text it was given, survives its file, and says what it cannot spell."""

import functools
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.data import tokenizers
from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)

TEXTS = ["the cat sat on the mat", "the dog and the cat\n", "def f(x):\n    return x + 1\n"] * 5
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe():
    return _trained()


@given(ANY_TEXT)
def test_bytes_spell_every_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ANY_TEXT, ANY_TEXT)
def test_characters_spell_every_text_over_their_alphabet(alphabet, more):
    tokenizer = CharTokenizer(alphabet + more, separated=True)
    ids = tokenizer.encode(alphabet)
    assert len(ids) == len(alphabet)
    assert tokenizer.decode(ids) == alphabet


@settings(max_examples=50)
@given(ANY_TEXT)
def test_trained_bpe_spells_every_text(text):
    tokenizer = _trained()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@functools.cache  # hypothesis and fixtures do not go together
def _trained():
    return train_bpe(TEXTS, 280)


@given(st.lists(st.integers(-10, 400)))
def test_decoding_never_raises(ids):
    for tokenizer in (ByteTokenizer(), CharTokenizer("abc", separated=True), _trained()):
        assert isinstance(tokenizer.decode(ids), str)


def test_ids_outside_the_vocabulary_and_broken_bytes_are_replaced_and_special_tokens_are_silent(bpe):
    assert ByteTokenizer().decode([97, 300, 98, -1]) == "a\ufffdb\ufffd"
    assert ByteTokenizer().decode([0xE9, 97]) == "\ufffda"
    assert ByteTokenizer().decode([97, 256, 257]) == "a"
    assert CharTokenizer("ab", separated=True).decode([0, 2, 3, 4, 1]) == "a\ufffdb"
    assert bpe.decode([bpe.eos_id, *bpe.encode("cat"), bpe.vocab_size]) == "cat\ufffd"


def test_a_special_token_spelt_in_the_text_is_ordinary_text(bpe):
    text = "a<|endoftext|>b"
    assert bpe.eos_id not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text


def test_vocabularies_count_their_special_tokens(bpe):
    byte = ByteTokenizer()
    assert (byte.vocab_size, byte.eos_id, byte.pad_id) == (258, 256, 257)
    plain, separated = CharTokenizer("cab", separated=False), CharTokenizer("cab", separated=True)
    assert (plain.vocab_size, plain.eos_id, plain.pad_id) == (3, None, None)
    assert (separated.vocab_size, separated.eos_id, separated.pad_id) == (5, 3, 4)
    assert plain.encode("abc") == [0, 1, 2]
    assert bpe.vocab_size == 280
    assert {bpe.eos_id, bpe.pad_id} == {0, 1}


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(DataError, match=r"character '\u00e9' \(U\+00E9\) at position 3 is not among the 2"):
        CharTokenizer("ab", separated=False).encode("aba\u00e9b")


def test_the_place_of_an_unknown_character_counts_from_the_start_of_a_long_text(monkeypatch):
    monkeypatch.setattr(tokenizers, "_PIECE", 4)
    with pytest.raises(DataError, match="at position 9 "):
        CharTokenizer("ab", separated=False).encode("ababababaXab")


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_long_texts_are_encoded_in_pieces_that_join_up(monkeypatch, bpe, size):
    text = "".join(TEXTS)
    whole = {t: t.encode(text) for t in (ByteTokenizer(), CharTokenizer(text, separated=False))}
    monkeypatch.setattr(tokenizers, "_PIECE", size)
    for tokenizer, ids in whole.items():
        assert tokenizer.encode(text) == ids
    assert bpe.decode(bpe.encode(text)) == text


def test_a_tokenizer_survives_its_file(tmp_path, bpe):
    for tokenizer in (ByteTokenizer(), CharTokenizer("a\u00e9\n\U0001f600", separated=True), bpe):
        path = tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path)
        assert path == tmp_path / "tokenizer.json"
        assert again.hash == tokenizer.hash
        assert (again.name, again.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
        assert (again.eos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
        assert again.encode("a\n") == tokenizer.encode("a\n")
        assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_different_tokenizers_have_different_hashes(bpe):
    found = {
        tokenizer.hash
        for tokenizer in (
            ByteTokenizer(),
            CharTokenizer("ab", separated=True),
            CharTokenizer("ab", separated=False),
            CharTokenizer("abc", separated=True),
            bpe,
        )
    }
    assert len(found) == 5


def test_a_file_of_the_tokenizers_library_is_read_without_its_truncation_and_padding(tmp_path, bpe):
    from tokenizers import Tokenizer as Library

    library = Library.from_str(json.dumps(bpe.definition()))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "".join(TEXTS)
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text) == bpe.encode(text)


def test_a_vocabulary_with_gaps_is_as_large_as_its_largest_id(bpe):
    definition = json.loads(json.dumps(bpe.definition()))
    vocabulary = definition["model"]["vocab"]
    vocabulary["zz"] = 1000
    assert tokenizers.LibraryTokenizer(json.dumps(definition)).vocab_size == 1001


def test_training_again_gives_the_same_tokenizer_in_another_process(bpe):
    code = f"from stackwise.data.tokenizers import train_bpe\nprint(train_bpe({TEXTS!r}, 280).hash)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == bpe.hash


def test_bpe_makes_text_shorter_than_its_bytes(bpe):
    text = TEXTS[0]
    assert len(bpe.encode(text)) < 0.7 * len(text)


def test_a_vocabulary_below_what_is_always_there_is_refused():
    with pytest.raises(DataError, match="vocab_size is 257, below the 258"):
        train_bpe(TEXTS, 257)
    assert train_bpe(TEXTS, 258).vocab_size == 258


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": {}}',
        '{"format": "stackwise-tokenizer", "version": 1, "kind": "word"}',
        '{"format": "stackwise-tokenizer", "version": 2, "kind": "byte"}',
        '{"format": "stackwise-tokenizer", "version": 1, "kind": "char"}',
        '{"format": "stackwise-tokenizer"}',
    ],
)
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DamagedDataError, match=r"tokenizer\.json: this is not a tokenizer"):
        load_tokenizer(path)


def test_a_tokenizer_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedDataError, match=r"tokenizer\.json: this is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_names_of_tokenizers(tmp_path, bpe):
    bpe.save(tmp_path / "tokenizer.json")
    assert open_tokenizer("byte").name == "byte"
    assert open_tokenizer(str(tmp_path)).name == "bpe"
    with pytest.raises(
        FileNotFoundError, match=r"data\.tokenizer: there is no file '\./none\.json'; allowed: byte"
    ):
        open_tokenizer("./none.json")
    with pytest.raises(DataError, match=r"data\.tokenizer is 'bytes'.*did you mean 'byte'"):
        open_tokenizer("bytes")


def test_a_hub_tokenizer_that_cannot_be_fetched_says_so(monkeypatch, tmp_path, bpe):
    import huggingface_hub

    def unreachable(name, file):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"'org/name' is no file here and cannot be fetched.*no network"):
        open_tokenizer("org/name")
    path = bpe.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(path))
    assert open_tokenizer("org/name").hash == bpe.hash
