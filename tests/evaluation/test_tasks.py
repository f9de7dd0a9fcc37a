"""Task files: what a row says, what is wrong with one, shots, and the figures made of the scores."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.tokenizers import ByteTokenizer, CharTokenizer
from stackwise.evaluation.requests import Score
from stackwise.evaluation.tasks import limited, names_of, read_task, with_shots
from stackwise.evaluation.zero_shot import run_task

PAIR = {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps.", "UID": "ignored"}
QUIZ = {"prompt": "2 + 2 =", "choices": ["4", "five", "six"], "answer": 0}
ASK = {"prompt": "Paris is in", "answer": ["France", "Europe"]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


class ByText:
    """A scorer by a table: nats of the text of the continuation."""

    label, start = "exact", 256

    def __init__(self, nats: dict[str, float], cut: int = 0) -> None:
        self.nats, self.cut, self.seen = nats, cut, []

    def score(self, requests, *, greedy=False, wheres=None, progress=None):
        texts = [
            (bytes(i for i in r.context if i < 256).decode(), bytes(r.continuation).decode())
            for r in requests
        ]
        self.seen += texts
        return [Score(self.nats[text], None, self.cut) for _, text in texts]


def no_text(prompt, until, max_new_tokens):
    raise AssertionError("nothing is generated")


def test_rows_show_their_kind(tmp_path):
    pairs = read_task(write(tmp_path / "a.jsonl", PAIR, "", PAIR))
    assert (pairs.kind, pairs.name, len(pairs.items)) == ("pairs", "a", 2)
    assert pairs.items[1].where.endswith("a.jsonl:3")
    assert pairs.hash == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    quiz = read_task(write(tmp_path / "b.jsonl", {**QUIZ, "answer": "five"}))
    assert (quiz.kind, quiz.items[0].right) == ("choice", 1)
    ask = read_task(
        write(tmp_path / "c.jsonl", {**ASK, "answer": "France", "until": [".", "!"], "max_new_tokens": 3})
    )
    assert (ask.kind, ask.items[0].answers, ask.items[0].until) == ("generation", ("France",), (".", "!"))
    assert ask.items[0].max_new_tokens == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence_god": "a", "sentence_bad": "b"}, "did you mean 'sentence_good'"),
        ({**PAIR, "sentence_bad": PAIR["sentence_good"]}, "are the same"),
        ({**PAIR, "sentence_bad": " "}, "sentence_bad must be a text that is not empty, got ' '"),
        ({**QUIZ, "choices": ["4"]}, "at least two texts"),
        ({**QUIZ, "choices": ["4", 5]}, "a choice must be a text that is not empty, got 5"),
        ({**QUIZ, "choices": ["4", "4"]}, "two choices are the same"),
        ({**QUIZ, "answer": 3}, "its number, from 0 to 2, got 3"),
        ({**QUIZ, "answer": True}, "its number, from 0 to 2, got true"),
        ({**QUIZ, "answer": "seven"}, "its number, from 0 to 2, got 'seven'"),
        ({**QUIZ, "prompt": 3}, "prompt must be a text, got 3"),
        ({**ASK, "answer": []}, "answer must be a list of texts"),
        ({**ASK, "until": "x"}, "until must be a list of texts"),
        ({**ASK, "until": [""]}, "until must be a text that is not empty"),
        ({**ASK, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([1, 2], "a row is a JSON object"),
    ],
    ids=str,
)
def test_a_wrong_row_is_refused_with_its_place(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as caught:
        read_task(write(tmp_path / "t.jsonl", "", row))
    assert caught.value.where.endswith("t.jsonl:2")


def test_a_wrong_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="a choice row in a file of pairs rows"):
        read_task(write(tmp_path / "t.jsonl", PAIR, QUIZ))
    with pytest.raises(DataError, match="holds no rows"):
        read_task(write(tmp_path / "t.jsonl", ""))
    with pytest.raises(DamagedDataError, match=r"t\.jsonl:1: is not JSON"):
        read_task(write(tmp_path / "t.jsonl", '{"sentence_good": '))
    (tmp_path / "t.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DamagedDataError, match="byte 12 is not UTF-8"):
        read_task(tmp_path / "t.jsonl")
    with pytest.raises(FileNotFoundError):
        read_task(tmp_path / "absent.jsonl")
    task = read_task(write(tmp_path / "t.jsonl", PAIR))
    with pytest.raises(DataError, match="two task files are called t"):
        names_of([task, task])


def test_shots_come_from_the_file_beside_or_from_the_first_rows(tmp_path):
    path = write(
        tmp_path / "quiz.jsonl", QUIZ, {**QUIZ, "prompt": "3 + 3 =", "answer": 2}, {**QUIZ, "prompt": "last"}
    )
    task = read_task(path)
    two = with_shots(task, 2)
    assert [item.prompt for item in two.items] == ["2 + 2 = 4\n\n3 + 3 = six\n\nlast"]
    assert (two.shots, with_shots(task, 0)) == (2, task)
    assert two.hash not in (task.hash, with_shots(task, 1).hash)
    write(tmp_path / "quiz.shots.jsonl", {**QUIZ, "prompt": "1 + 3 ="})
    assert [item.prompt for item in with_shots(task, 1).items] == [
        "1 + 3 = 4\n\n" + item.prompt for item in task.items
    ]
    with pytest.raises(DataError, match="2 shots were asked for, and there are 1 rows"):
        with_shots(task, 2)
    write(tmp_path / "quiz.shots.jsonl", ASK)
    with pytest.raises(DataError, match="holds generation rows and the task choice rows"):
        with_shots(task, 1)
    (tmp_path / "quiz.shots.jsonl").unlink()
    with pytest.raises(DataError, match="3 shots were asked for"):
        with_shots(task, 3)  # no row would be left
    with pytest.raises(DataError, match="have no prompt"):
        with_shots(read_task(write(tmp_path / "p.jsonl", PAIR, PAIR)), 1)
    assert len(limited(task, 2).items) == 2


def test_accuracy_and_its_error(tmp_path):
    rows = [QUIZ, {**QUIZ, "answer": 1}, {**QUIZ, "answer": 2}]
    scorer = ByText({" 4": -3.0, " five": -2.0, " six": -9.0}, cut=1)
    found = run_task(read_task(write(tmp_path / "q.jsonl", *rows)), scorer, ByteTokenizer(), no_text)
    # the likeliest is five; by bytes (3, 0.5 and 3 nats each) it is five too
    assert found.metrics["acc"].value == pytest.approx(1 / 3)
    assert found.metrics["acc"].standard_error == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert (found.n, found.chance, found.cut, found.label) == (3, pytest.approx(1 / 3), 3, "exact")
    assert scorer.seen[:2] == [("2 + 2 =", " 4"), ("2 + 2 =", " five")]
    one = run_task(limited(read_task(tmp_path / "q.jsonl"), 1), scorer, ByteTokenizer(), no_text)
    assert one.metrics["acc"].standard_error is None


def test_the_norm_is_by_bytes_of_the_choice(tmp_path):
    """Two bytes for each ä: -3 nats over 4 bytes are better than -1 nat over one."""
    row = {"prompt": "q", "choices": ["ää", "x"], "answer": 0}
    scorer = ByText({" ää": -3.0, " x": -1.0})
    found = run_task(read_task(write(tmp_path / "q.jsonl", row)), scorer, ByteTokenizer(), no_text)
    assert (found.metrics["acc"].value, found.metrics["acc_norm"].value) == (0.0, 1.0)


def test_a_tie_is_won_by_nobody_in_a_pair_and_by_the_first_of_choices(tmp_path):
    pair = {"sentence_good": "a", "sentence_bad": "b"}
    scorer = ByText({" a": -1.0, " b": -1.0})
    found = run_task(read_task(write(tmp_path / "p.jsonl", pair)), scorer, ByteTokenizer(), no_text)
    assert (found.metrics["acc"].value, found.chance) == (0.0, 0.5)
    quiz = [{"prompt": "", "choices": ["a", "b"], "answer": n} for n in (0, 1)]
    found = run_task(read_task(write(tmp_path / "q.jsonl", *quiz)), scorer, ByteTokenizer(), no_text)
    assert found.metrics["acc"].value == 0.5


def test_generated_text_is_compared_with_all_answers(tmp_path):
    said = {"Paris is in": " Europe \n", "Bonn is in": " France or not", "Rome is in": " Italy"}
    asked = []

    def writes(prompt, until, max_new_tokens):
        asked.append((prompt, until, max_new_tokens))
        return said[prompt]

    rows = [{**ASK, "prompt": prompt} for prompt in said]
    found = run_task(read_task(write(tmp_path / "g.jsonl", *rows)), ByText({}), ByteTokenizer(), writes)
    assert found.metrics["exact_match"].value == pytest.approx(1 / 3)
    assert found.metrics["contains"].value == pytest.approx(2 / 3)
    assert asked[0] == ("Paris is in", ("\n",), 32)
    assert (found.label, found.chance) == ("greedy", None)
    with pytest.raises(ValueError, match="needs `write`"):
        run_task(read_task(tmp_path / "g.jsonl"), ByText({}), ByteTokenizer())


def test_null_is_the_usual_end_of_an_answer(tmp_path):
    (item,) = read_task(write(tmp_path / "g.jsonl", {**ASK, "until": None, "max_new_tokens": None})).items
    assert (item.until, item.max_new_tokens) == (("\n",), 32)


def test_a_prompt_that_cannot_be_continued_names_the_row(tmp_path):
    def refuses(prompt, until, max_new_tokens):
        raise DataError("no such character", hint="write others")

    with pytest.raises(DataError, match=r"g\.jsonl:1: no such character; write others"):
        run_task(read_task(write(tmp_path / "g.jsonl", ASK)), ByText({}), ByteTokenizer(), refuses)


def test_text_that_the_tokenizer_cannot_spell_names_the_row(tmp_path):
    task = read_task(write(tmp_path / "p.jsonl", PAIR))
    with pytest.raises(DataError, match=r"p\.jsonl:1: the character"):
        run_task(task, ByText({}), CharTokenizer("abc", separated=True), no_text)
