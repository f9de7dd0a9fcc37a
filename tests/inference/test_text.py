"""From prompt to text: whole characters, stop strings, and a loop of turns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from stackwise.inference import text as text_module
from stackwise.inference.chat import ChatSession
from stackwise.inference.settings import GenerationSettings
from stackwise.inference.text import CharacterStream, StopStrings, complete
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack

BYTE = ByteTokenizer()
BPE = train_bpe(["the cat sat on the mat, naïve café 猫は座った "] * 20, 300)


def rack_of(vocab_size: int = BYTE.vocab_size, **options: Any) -> Rack:
    return create_simple_rack(
        1, 1, 16, 24, 2, vocab_size, attention_preset="gpt_style", **{"max_seq_len": 64, **options}
    )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Have `complete` receive these tokens instead of a model's."""

    def install(tokens: list[int]) -> None:
        def generate(
            rack: Rack, ids: torch.Tensor, *, max_new_tokens: int, on_token: Any, **options: Any
        ) -> None:
            for token in tokens[:max_new_tokens]:
                if on_token(torch.tensor([token])):
                    return

        monkeypatch.setattr(text_module, "generate", generate)

    return install


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = CharacterStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


def test_a_character_comes_with_the_last_of_its_bytes() -> None:
    assert streamed(BYTE, list("aé猫🙂".encode())) == ["a", "", "é", "", "", "猫", "", "", "", "🙂", ""]


def test_a_character_that_is_never_completed_ends_as_a_replacement() -> None:
    assert streamed(BYTE, list("a🙂".encode()[:-1])) == ["a", "", "", "", "\ufffd"]


@given(st.text(max_size=120))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_streamed_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 299), max_size=150))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_any_tokens_at_all_stream_to_what_decoding_them_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def passed(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    filter_ = StopStrings(stops)
    shown = "".join([*(filter_.push(piece) for piece in pieces), filter_.flush()])
    return shown, filter_.found


def test_a_stop_string_that_comes_in_pieces_is_not_shown() -> None:
    assert passed(["END"], ["one E", "N", "D two"]) == ("one ", "END")
    assert passed(["aab"], ["a", "a", "a", "b"]) == ("a", "aab")


def test_what_only_began_like_a_stop_string_is_shown() -> None:
    filter_ = StopStrings(["END"])
    assert [filter_.push(piece) for piece in ("xE", "N", "C", "EN")] == ["x", "", "ENC", ""]
    assert filter_.flush() == "EN"
    assert filter_.found is None


def test_the_first_of_several_stop_strings_counts_and_of_equal_starts_the_longest() -> None:
    assert passed(["cd", "b"], ["abcd"]) == ("a", "b")
    assert passed(["b", "bc"], ["abc"]) == ("a", "bc")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["", "x"])


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_stopping_does_not_depend_on_how_the_text_is_cut_once_shown(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, found = passed(stops, [text[a:b] for a, b in pairwise(edges)])
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert (found is not None) == bool(ends)
    assert text.startswith(shown)
    if found is None:
        assert shown == text
    else:
        assert text.startswith(shown + found)
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "reason", "count"),
    [
        (list(b"Hello"), [], "Hello", "length", 5),
        (list(b"one\n\ntwo"), ["\n\n"], "one", "stop", 5),
        ([*b"bye", 256, *b"not this"], [], "bye", "eos", 4),
        (list("né\nx".encode()), ["\n"], "né", "stop", 4),
        (list("é".encode())[:1], [], "\ufffd", "length", 1),
        (list(b"a\n"), ["\n\n"], "a\n", "length", 2),
    ],
)
def test_a_completion_ends_for_a_reason(
    scripted: Callable[[list[int]], None],
    tokens: list[int],
    stop: list[str],
    text: str,
    reason: str,
    count: int,
) -> None:
    scripted(tokens)
    pieces: list[str] = []
    result = complete(rack_of(), BYTE, "go", GenerationSettings(stop=stop), pieces.append)
    assert (result.text, result.reason, result.tokens) == (text, reason, tokens[:count])
    assert "".join(pieces) == result.text
    assert "" not in pieces


def test_a_completion_of_a_model_is_long_repeatable_and_timed() -> None:
    options = GenerationSettings(max_new_tokens=90, seed=3)  # more than the context of 64
    first, second = (complete(rack_of(), BYTE, "def ", options) for _ in range(2))
    assert first.text == second.text
    assert first.reason in ("length", "eos")
    assert first.seconds > 0
    assert first.tokens_per_second == pytest.approx(len(first.tokens) / first.seconds)
    assert first.text != complete(rack_of(), BYTE, "def ", GenerationSettings(max_new_tokens=90, seed=4)).text


def test_an_empty_prompt_begins_with_a_newline_or_the_first_token() -> None:
    assert BYTE.start_ids() == [10]
    assert CharTokenizer("ab\n", separated=False).start_ids() == [0]
    assert CharTokenizer("abc", separated=False).start_ids() == [0]
    characters = CharTokenizer("abc", separated=False)
    result = complete(rack_of(3), characters, "", GenerationSettings(max_new_tokens=5))
    assert len(result.text) == 5


def test_a_foreign_tokenizer_and_unknown_text_are_refused() -> None:
    with pytest.raises(ValueError, match="258 ids and the model knows 100"):
        complete(rack_of(100), BYTE, "x")
    with pytest.raises(ValueError, match="'x'"):
        complete(rack_of(3), CharTokenizer("abc", separated=False), "x")


def test_a_session_continues_one_running_text(scripted: Callable[[list[int]], None]) -> None:
    session = ChatSession(rack_of(), BYTE, GenerationSettings(stop=["\n"], seed=7))
    scripted(list(b" yes\nmore"))
    assert session.say("Is it?").text == " yes"
    scripted(list(b"no"))
    session.say("And now?")
    assert session.text == "Is it?\n yes\nAnd now?\nno"
    assert session.turns == 2


def test_each_turn_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(text_module, "generate", lambda rack, ids, *, seed, **options: seeds.append(seed))
    session = ChatSession(rack_of(), BYTE, GenerationSettings(seed=7))
    session.say("a")
    session.say("b")
    assert seeds == [7, 8]


def lines(*given: str | type[BaseException]) -> Callable[[], str]:
    queue = list(given)

    def read() -> str:
        item = queue.pop(0)
        if isinstance(item, str):
            return item
        raise item

    return read


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_loop_ends_cleanly(scripted: Callable[[list[int]], None], end: type[BaseException]) -> None:
    scripted(list(b"ok"))
    session = ChatSession(rack_of(), BYTE)
    written: list[str] = []
    session.loop(lines("hi", "", end), written.append)
    assert "".join(written) == "ok\n\n"
    assert session.turns == 1


def test_ctrl_c_in_a_reply_ends_the_loop_and_forgets_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_module, "generate", interrupted)
    session = ChatSession(rack_of(), BYTE)
    session.loop(lines("hi"), lambda piece: None)
    assert session.text == ""


def test_a_line_the_tokenizer_cannot_spell_is_reported_and_the_loop_goes_on() -> None:
    session = ChatSession(
        rack_of(4), CharTokenizer("abc\n", separated=False), GenerationSettings(max_new_tokens=2)
    )
    written: list[str] = []
    session.loop(lines("xyz", "abc", EOFError), written.append)
    assert "'x'" in written[0]
    assert session.text.startswith("abc\n")
