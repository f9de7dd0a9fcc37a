"""Texts with gaps: how they are read, filled and cut; candidates for gaps; vectors of texts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.data.tokenizers import ByteTokenizer, CharTokenizer
from stackwise.inference.encoder import cosines, embed, fill
from stackwise.inference.errors import AskedError
from stackwise.inference.masked_text import Piece, encode_gaps, gaps_in, infill, pieces_of
from stackwise.inference.settings import GenerationSettings

CHARACTERS = CharTokenizer("abcdefgh", separated=True)
MASK = CHARACTERS.vocab_size
EOS = CHARACTERS.eos_id


class Alphabet:
    """Predicts the token whose id is its position modulo `n`, with two other tokens behind it."""

    mask_id = MASK
    intervals = None
    shifted = False

    def __init__(self, n: int = 8) -> None:
        self.n, self.forwards = n, 0

    def logits(self, input_ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
        self.forwards += 1
        logits = torch.full((len(positions), MASK + 1), -math.inf)
        place = positions % input_ids.shape[1]
        for rank, odds in enumerate((0.7, 0.2, 0.1)):
            logits[torch.arange(len(positions)), (place + rank) % self.n] = math.log(odds)
        return logits


class Tokens:
    """Hidden states that tell token and length: (id, 1, number of real tokens)."""

    def hidden(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, **given: Any) -> Tensor:
        assert attention_mask is not None
        real = attention_mask.sum(1, keepdim=True).expand_as(input_ids)
        garbage = torch.where(attention_mask, 0.0, 1e6)  # what a model puts at padding must not count
        return torch.stack((input_ids + garbage, torch.ones_like(garbage), real + garbage), dim=-1)


def settings(**options: Any) -> GenerationSettings:
    return GenerationSettings(temperature=0.0, **options)


def test_a_gap_is_one_token_or_as_many_as_it_says() -> None:
    assert encode_gaps(CHARACTERS, "a[MASK]b[MASK:3]", MASK) == [0, MASK, 1, MASK, MASK, MASK]
    assert encode_gaps(CHARACTERS, "", MASK) == []
    assert gaps_in("a[MASK]b[MASK:3] [MASK:] [mask]") == 2
    with pytest.raises(AskedError, match=r"\[MASK:0\] is empty"):
        encode_gaps(CHARACTERS, "a[MASK:0]", MASK)
    with pytest.raises(ValueError, match="'z'"):
        encode_gaps(CHARACTERS, "a[MASK]z", MASK)


def test_gaps_are_filled_and_what_is_given_stays() -> None:
    done = infill(Alphabet(), CHARACTERS, "hh[MASK:2]h[MASK]", settings(max_new_tokens=9), max_length=6)
    assert done.text == "hhcdhf", "a text with gaps is not continued"
    assert done.pieces == [
        Piece("given", "hh", 2),
        Piece("filled", "cd", 2),
        Piece("given", "h", 1),
        Piece("filled", "f", 1),
    ]
    assert done.result.forwards >= 1


def test_a_text_without_gaps_is_continued() -> None:
    done = infill(Alphabet(), CHARACTERS, "hh", settings(max_new_tokens=4), max_length=6)
    assert done.text == "hhcdef"
    assert infill(Alphabet(), CHARACTERS, "", settings(max_new_tokens=3), max_length=6).text == "abc"


def test_a_continuation_ends_at_the_end_of_text_and_before_a_stop_string() -> None:
    model = Alphabet(EOS + 1)  # ... g h EOS a b ...
    long = settings(max_new_tokens=10)
    assert infill(model, CHARACTERS, "aaaaa", long, max_length=20).text == "aaaaafgh"
    done = infill(
        Alphabet(), CHARACTERS, "cde", settings(max_new_tokens=10, stop=["h", "g", "cd"]), max_length=20
    )
    assert done.text == "cde" + "def", "a stop string cuts the continuation, not the prompt"


def test_neither_ends_a_gap() -> None:
    model = Alphabet(EOS + 1)
    done = infill(model, CHARACTERS, "aaaaaaa[MASK:3]a", settings(stop=["h"]), max_length=20)
    assert done.text == "aaaaaaa" + "h" + "a" + "a", (
        "the end of text has no characters, and what follows it stays"
    )


def test_each_step_is_shown_from_the_masked_text_to_the_whole() -> None:
    seen: list[list[Piece]] = []
    options = settings(steps=3, block_length=1)
    done = infill(Alphabet(), CHARACTERS, "hh[MASK:3]", options, max_length=9, on_step=seen.append)
    assert seen[0] == [Piece("given", "hh", 2), Piece("masked", "", 3)]
    assert seen[1] == [Piece("given", "hh", 2), Piece("filled", "c", 1), Piece("masked", "", 2)]
    assert seen[-1] == done.pieces
    assert len(seen) == 4


def test_all_settings_of_sampling_are_passed_on() -> None:
    def drawn(**options: Any) -> str:
        return infill(
            Alphabet(), CHARACTERS, "", GenerationSettings(max_new_tokens=8, **options), max_length=8
        ).text

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(top_k=1) == drawn(top_p=0.1) == drawn(temperature=0.0) == "abcdefgh"

    def took(**options: Any) -> int:
        chosen = settings(max_new_tokens=8, **options)
        return infill(Alphabet(), CHARACTERS, "", chosen, max_length=8).result.forwards

    assert took(steps=2) == 2
    assert took(steps=2, block_length=4) == 2
    assert took(steps=2, block_length=2) == 4
    assert took(sampler="threshold", threshold=0.6) == 1
    assert took(sampler="threshold", threshold=0.8) == 8

    def left_after_one(grid: Any) -> int:
        seen: list[list[Piece]] = []
        chosen = settings(max_new_tokens=8, steps=2, grid=grid)
        infill(Alphabet(), CHARACTERS, "", chosen, max_length=8, on_step=seen.append)
        return sum(piece.tokens for piece in seen[1] if piece.kind == "masked")

    assert (left_after_one("linear"), left_after_one("cosine")) == (4, 6)


def test_a_shifted_model_begins_after_a_token_that_is_not_shown() -> None:
    class Shifted(Alphabet):
        shifted = True
        first: list[int] = []

        def logits(self, input_ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
            self.first.append(int(input_ids[0, 0]))
            return super().logits(input_ids, positions - 1)

    model, seen = Shifted(), list[list[Piece]]()
    done = infill(model, CHARACTERS, "[MASK:2]h", settings(), max_length=4, on_step=seen.append)
    assert done.text == "abh"
    assert set(model.first) == set(CHARACTERS.start_ids())
    assert seen[0] == [Piece("masked", "", 2), Piece("given", "h", 1)]
    assert infill(model, CHARACTERS, "", settings(max_new_tokens=3), max_length=4).text == "abc"
    model.first.clear()
    assert infill(model, CHARACTERS, "h", settings(max_new_tokens=3), max_length=4).text == "habc"
    assert set(model.first) == {CHARACTERS.encode("h")[0]}


def test_a_continuation_beyond_the_context_goes_on_behind_its_newer_half() -> None:
    seen: list[list[Piece]] = []

    class Seen(Alphabet):
        rows: list[list[int]] = []

        def logits(self, input_ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
            self.rows.append(input_ids[0].tolist())
            return super().logits(input_ids, positions)

    model = Seen()
    one = settings(max_new_tokens=11, steps=1)
    done = infill(model, CHARACTERS, "hg", one, max_length=6, on_step=seen.append)
    assert done.text == "hg" + "cdef" + "def" + "def" + "d"
    new = [MASK] * 3
    assert model.rows == [[7, 6] + [MASK] * 4, [3, 4, 5, *new], [3, 4, 5, *new], [3, 4, 5, MASK]]
    assert (done.result.forwards, done.result.steps) == (4, 4)
    assert done.result.ids.shape == (1, 13)
    assert [sum(p.tokens for p in pieces if p.kind == "masked") for pieces in seen] == [11, 7, 4, 1, 0]
    assert infill(model, CHARACTERS, "hgfedcbah", one, max_length=6).text[:12] == "hgfedcbah" + "def"
    model.rows.clear()
    stopped = settings(max_new_tokens=50, steps=1, stop=["e"])
    assert infill(model, CHARACTERS, "hg", stopped, max_length=6).text == "hgcd"
    assert len(model.rows) == 1, "what comes after the end is not computed"


def test_every_window_has_random_numbers_of_its_own() -> None:
    done = infill(Alphabet(), CHARACTERS, "", GenerationSettings(max_new_tokens=400), max_length=8).text
    windows = {done[i : i + 4] for i in range(8, 400, 4)}
    assert len(windows) > 10


def test_a_text_with_gaps_must_fit() -> None:
    with pytest.raises(AskedError, match="has 9 tokens, more than max_seq_len = 8"):
        infill(Alphabet(), CHARACTERS, "a[MASK:8]", settings(), max_length=8)


def test_pieces_join_to_the_text_also_inside_characters() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("né")
    pieces = pieces_of(tokenizer, ids, [True, False, False], 999)
    assert "".join(piece.text for piece in pieces) == "né"
    broken = pieces_of(tokenizer, ids, [True, True, False], 999)
    assert [piece.tokens for piece in broken] == [2, 1]
    assert broken[0].text == "n\ufffd"


def test_candidates_are_the_likeliest_of_each_gap() -> None:
    first, second = fill(Alphabet(), CHARACTERS, "a[MASK]cd[MASK]", top=2, max_length=8)
    assert [(c.token, c.id) for c in first] == [("b", 1), ("c", 2)]
    assert [c.token for c in second] == ["e", "f"]
    assert [c.probability for c in second] == pytest.approx([0.7, 0.2])
    model = Alphabet()
    assert len(fill(model, CHARACTERS, "[MASK]", top=50, max_length=8)[0]) == 3, "what cannot come is none"
    assert model.forwards == 1
    with pytest.raises(AskedError, match=r"write \[MASK\]"):
        fill(model, CHARACTERS, "abc", max_length=8)
    with pytest.raises(AskedError, match="top must be at least 1, got 0"):
        fill(model, CHARACTERS, "[MASK]", top=0, max_length=8)
    with pytest.raises(AskedError, match="9 tokens, more than max_seq_len = 8"):
        fill(model, CHARACTERS, "[MASK:9]", max_length=8)


def test_a_vector_is_the_mean_over_the_real_tokens_whatever_the_batch() -> None:
    texts = ["abc", "h", "aabbccdd", "bd"]
    vectors = embed(Tokens(), CHARACTERS, texts, max_length=8)
    expected = [[sum(CHARACTERS.encode(t)) / len(t), 1.0, len(t)] for t in texts]
    torch.testing.assert_close(vectors, torch.tensor(expected))
    for size in (1, 3):
        assert torch.equal(embed(Tokens(), CHARACTERS, texts, max_length=8, batch_size=size), vectors)
    with pytest.raises(AskedError, match="'' has no tokens"):
        embed(Tokens(), CHARACTERS, ["a", ""], max_length=8)
    with pytest.raises(AskedError, match="'abcdefgha' has 9 tokens, more than max_seq_len = 8"):
        embed(Tokens(), CHARACTERS, ["abcdefgha"], max_length=8)
    with pytest.raises(AskedError, match="no text"):
        embed(Tokens(), CHARACTERS, [], max_length=8)


def test_cosines_are_those_of_the_angles() -> None:
    vectors = torch.tensor([[1.0, 0.0], [3.0, 3.0], [-2.0, 0.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, -1], [half, 1, -half], [-1, -half, 1]], dtype=torch.float64)
    torch.testing.assert_close(cosines(vectors), expected)
