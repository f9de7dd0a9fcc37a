"""A tokenizer.json from elsewhere: what could end the process, or change what a text means, is refused (exit code 8)."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stackwise.data import tokenizer_rules
from stackwise.data.errors import DamagedDataError
from stackwise.data.tokenizer_rules import checked, probe
from stackwise.data.tokenizers import LibraryTokenizer, load_tokenizer, open_tokenizer, train_bpe
from stackwise.storage.errors import DamagedFileError, UnsafeInputError

TEXT = "to be or not to be, that is the question; héllo wörld 漢字 12345 "
Definition = dict[str, Any]


@pytest.fixture(scope="module")
def plain() -> Definition:
    return train_bpe([TEXT * 20], 300).definition()


def unigram(**changes: Any) -> Definition:
    model = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]],
        "byte_fallback": False,
    }
    return {"version": "1.0", "model": model | changes}


def word_level(**parts: Any) -> Definition:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"}
    return {"version": "1.0", "model": model, **parts}


def template(**token: Any) -> Definition:
    special = {"id": "a", "ids": [1], "tokens": ["a"]} | token
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, piece],
        "pair": [piece],
        "special_tokens": {"a": special},
    }


def added(i: Any, content: Any = "new", **more: Any) -> list[Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": content, "special": True, **flags, **more}]


def split(pattern: str) -> Definition:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: str, content: str) -> Definition:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


PADDING = {
    "strategy": {"Fixed": 2**31},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "a",
}


def nested(depth: int) -> Definition:
    part: Definition = {"type": "Lowercase"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


BAD: dict[str, tuple[Definition, str]] = {
    "two tokens of one id": ({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 0}}}, "two tokens one id"),
    "a negative id": ({"model": {"type": "WordLevel", "vocab": {"a": -1}}}, "no number from 0"),
    "an id that is a fraction": ({"model": {"type": "WordLevel", "vocab": {"a": 0.5}}}, "no number from 0"),
    "an id that is true": ({"model": {"type": "WordLevel", "vocab": {"a": True}}}, "no number from 0"),
    "an id that is a text": ({"model": {"type": "WordLevel", "vocab": {"a": "0"}}}, "no number from 0"),
    "a gap of two billion": ({"model": {"type": "WordLevel", "vocab": {"a": 2**31 - 1}}}, "id 2147483647"),
    "a vocabulary that is a text": ({"model": {"type": "WordLevel", "vocab": "abc"}}, "neither a map"),
    "an unknown model": ({"model": {"type": "Pickle", "vocab": {}}}, "model.type is 'Pickle'"),
    "a model that is a list": ({"model": {"type": ["BPE"], "vocab": {}}}, "model.type"),
    "a field that is not known": (word_level(code="import os"), "code is no field"),
    "dropout": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}}, "random"),
    "a word of a billion": ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 2**30}}, "max_input"),
    "a piece twice": (unigram(vocab=[["a", 0.0], ["a", 1.0]]), "token twice"),
    "a piece that is a number": (unigram(vocab=[[3, 0.0]]), "token twice, or one that is no text"),
    "a piece without score": (unigram(vocab=[["a"]]), "token twice, or one that is no text"),
    "an unknown piece outside": (unigram(unk_id=3), "unk_id is 3"),
    "a negative unknown piece": (unigram(unk_id=-1), "unk_id is -1"),
    "an unknown piece that is true": (unigram(unk_id=True), "unk_id is True"),
    "an added token in place of another": (word_level(added_tokens=added(1, "new")), "another meaning"),
    "an added token that moves": (word_level(added_tokens=added(7, "a")), "another meaning"),
    "an added token twice": (word_level(added_tokens=added(3) + added(4)), "another meaning"),
    "an added token far away": (word_level(added_tokens=added(2**31)), "the id 2147483648"),
    "an added token below zero": (word_level(added_tokens=added(-1)), "has the id -1"),
    "an added token without text": (word_level(added_tokens=added(3, "")), "1 to 1024 characters"),
    "an added token of a megabyte": (word_level(added_tokens=added(3, "x" * 2**20)), "1 to 1024"),
    "an added token that is none": (word_level(added_tokens=["new"]), "is no map"),
    "added tokens that are a map": (word_level(added_tokens={"a": 1}), "is no map"),
    "a template with another id": (word_level(post_processor=template(ids=[999_999_999])), "id 999999999"),
    "a template with the id of another token": (word_level(post_processor=template(ids=[2])), "not its id"),
    "a template with an unknown token": (word_level(post_processor=template(tokens=["z"])), "not its id"),
    "a template with too few ids": (word_level(post_processor=template(ids=[])), "as many ids"),
    "a template whose id is a text": (word_level(post_processor=template(ids=["1"])), "no pair"),
    "a separator with another id": (word_level(post_processor={"type": "BertProcessing", "sep": ["a", 2], "cls": ["b", 2]}), "not its id"),
    "a separator that is none": (word_level(post_processor={"type": "RobertaProcessing", "sep": 3, "cls": ["b", 2]}), "no pair"),
    "an unknown normalizer": (word_level(normalizer={"type": "Python"}), "known: BertNormalizer"),
    "a normalizer that is a text": (word_level(normalizer="NFC"), "is of the kind 'NFC'"),
    "a decoder as normalizer": (word_level(normalizer={"type": "CTC"}), "is of the kind 'CTC'"),
    "an unknown pre-tokenizer": (word_level(pre_tokenizer={"type": "Custom"}), "is of the kind 'Custom'"),
    "an unknown decoder": (word_level(decoder={"type": "exec"}), "is of the kind 'exec'"),
    "an unknown post-processor": (word_level(post_processor={"type": "x"}), "is of the kind 'x'"),
    "an unknown part inside of a sequence": (word_level(normalizer={"type": "Sequence", "normalizers": [{"type": "x"}]}), "'x'"),
    "a sequence that is no list": (word_level(normalizer={"type": "Sequence", "normalizers": {"type": "NFC"}}), "is no list"),
    "parts in parts in parts": (word_level(normalizer=nested(9)), "parts in parts"),
    "a thousand parts": (word_level(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}), "more than 64"),
    "replacements that multiply": (word_level(normalizer={"type": "Sequence", "normalizers": [replace("a", "a" * 100)] * 5}), "times longer"),
    "replacements in the decoder": (word_level(decoder={"type": "Sequence", "decoders": [replace("a", "a" * 100)] * 5}), "times longer"),
    "a replacement of a megabyte": (word_level(normalizer=replace("a", "b" * 2**20)), "1024 at most"),
    "a prefix of a megabyte": (word_level(normalizer={"type": "Prepend", "prepend": "b" * 2**20}), "1024 at most"),
    "a pattern of a megabyte": (word_level(pre_tokenizer=split("a?" * 2**19)), "8192 at most"),
    "a strip of a billion": (word_level(decoder={"type": "Strip", "content": " ", "start": 2**30, "stop": 0}), "start is"),
}  # fmt: skip

PROBED: dict[str, tuple[Definition, str]] = {
    "a pattern that never ends": (word_level(pre_tokenizer=split("(a+)+$")), "refused"),
    "the same on a letter of its own": (word_level(pre_tokenizer=split("(б+)+$")), "refused"),
    "a pattern that is none": (word_level(pre_tokenizer=split("(")), "refused"),
    "a part without its fields": (word_level(pre_tokenizer={"type": "Split"}), "refused"),
    "merges of tokens that are not there": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}, "refused"),
    "a table of characters that is none": (word_level(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "refused"),
}  # fmt: skip


def test_there_are_sixty_cases_by_hand() -> None:
    assert len(BAD) + len(PROBED) >= 55


def put(folder: Path, definition: Definition) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(definition))
    return path


@pytest.mark.parametrize("case", BAD)
def test_what_a_tokenizer_may_not_say(case: str, tmp_path: Path) -> None:
    definition, says = BAD[case]
    path = put(tmp_path, definition)
    for load in (load_tokenizer, lambda p: open_tokenizer(str(p))):
        with pytest.raises(UnsafeInputError, match=says) as caught:
            load(path)
        assert caught.value.exit_code == 8
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", PROBED)
def test_what_shows_itself_only_when_it_is_used_is_found_in_a_process_of_its_own(
    case: str, tmp_path: Path
) -> None:
    definition, says = PROBED[case]
    with pytest.raises(UnsafeInputError, match=says):
        load_tokenizer(put(tmp_path, definition), foreign=True)


def test_a_pattern_that_gives_up_in_this_process_is_an_error_like_others() -> None:
    tokenizer = LibraryTokenizer(json.dumps(word_level(pre_tokenizer=split("(a+)+$"))))
    with pytest.raises(UnsafeInputError, match="cannot encode the text at character 0"):
        tokenizer.encode("a" * 5000 + "!")


def test_what_would_end_the_process_ends_the_child_alone() -> None:
    with pytest.raises(UnsafeInputError, match="using it ended the process"):
        probe(json.dumps(word_level(padding=PADDING)), "here")


def test_padding_and_truncation_are_left_out(plain: Definition, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path = put(tmp_path, {**plain, "padding": PADDING, "truncation": truncation})
    same = load_tokenizer(path, foreign=True)
    assert same.hash == LibraryTokenizer(json.dumps(plain)).hash
    assert same.decode(same.encode(TEXT)) == TEXT


GOOD: list[Callable[[], Definition]] = [
    lambda: train_bpe([TEXT * 20], 290).definition(),
    unigram,
    word_level,
    lambda: word_level(added_tokens=added(1, "a") + added(3), post_processor=template()),
    lambda: word_level(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, replace(" ", "▁")]}),
    lambda: word_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [split(r"\p{N}{1,3}"), {"type": "Digits", "individual_digits": True}]}),
    lambda: word_level(decoder={"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_tokenizers_as_they_are_in_use_pass(number: int, tmp_path: Path) -> None:
    definition = GOOD[number]()
    assert load_tokenizer(put(tmp_path, definition), foreign=True).vocab_size >= 3


def test_the_patterns_of_large_models_pass(tmp_path: Path) -> None:
    gpt4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    assert load_tokenizer(put(tmp_path, word_level(pre_tokenizer=split(gpt4))), foreign=True).vocab_size == 3


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(UnsafeInputError, match="larger than"):
        load_tokenizer(path)
    path.write_text('{"model": {"vocab": {"a": 0, "a": 1}}}')
    with pytest.raises(UnsafeInputError, match="'a' is given twice"):
        load_tokenizer(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError, match="a link"):
        load_tokenizer(path)


def test_a_verdict_is_asked_for_once_per_content(
    plain: Definition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, {**plain, "added_tokens": [*plain["added_tokens"], *added(300, "once")]})
    load_tokenizer(path, foreign=True)
    monkeypatch.setattr(tokenizer_rules.subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
    load_tokenizer(path, foreign=True)
    load_tokenizer(put(tmp_path, unigram()))  # a run's own is not from elsewhere


def test_another_tokenizer_than_was_stored_is_refused_before_it_is_loaded(
    plain: Definition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = LibraryTokenizer(json.dumps(plain)).hash
    assert load_tokenizer(put(tmp_path, plain), expected=wanted).hash == wanted
    flipped = copy.deepcopy(plain)
    vocabulary = flipped["model"]["vocab"]
    one, two = random.Random(3).sample(sorted(vocabulary), 2)
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path = put(tmp_path, flipped)
    assert load_tokenizer(path).vocab_size == len(vocabulary), "nothing else shows it"
    monkeypatch.setattr(LibraryTokenizer, "__init__", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(DamagedDataError, match="not the tokenizer that was stored here"):
        load_tokenizer(path, expected=wanted)


def test_changes_by_chance_give_a_tokenizer_or_a_typed_error(plain: Definition) -> None:
    draw = random.Random(5)
    values = [None, True, -1, 0, 3, 2**31, 0.5, "", "a", [], {}, [1], {"type": "Sequence"}]
    for _ in range(400):
        definition = copy.deepcopy(draw.choice([plain, unigram(), word_level(post_processor=template(), added_tokens=added(3))]))  # fmt: skip
        place: Any = definition
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
                place[key] = copy.deepcopy(draw.choice(values))
                break
            place = place[key]
        try:
            checked(definition, "here")
        except (UnsafeInputError, DamagedFileError):
            continue
