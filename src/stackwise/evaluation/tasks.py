"""Tasks for zero-shot and few-shot evaluation, in local files of one JSON object per line.

    minimal pairs     {"sentence_good": "...", "sentence_bad": "..."}
    multiple choice   {"prompt": "...", "choices": ["...", "..."], "answer": 0}
    generation        {"prompt": "...", "answer": "..." or ["...", "..."], "until": ["\\n"], "max_new_tokens": 32}

What a row is shows in its keys; further keys are ignored. All rows of a file are of one kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stackwise.config.errors import did_you_mean, show
from stackwise.data.errors import DamagedDataError, DataError

PAIRS, CHOICE, GENERATION = "pairs", "choice", "generation"
DELIMITER, BETWEEN = " ", "\n\n"
"""Between a prompt and its answer, and between examples: those of lm-eval."""
UNTIL, MAX_NEW_TOKENS = ("\n",), 32

KEYS = {
    PAIRS: ("sentence_good", "sentence_bad"),
    CHOICE: ("prompt", "choices", "answer"),
    GENERATION: ("prompt", "answer"),
}


@dataclass(frozen=True)
class Item:
    """A row. `options` are scored after the prompt and `right` is the number of the right one; a generation has `answers`
    in their place, each of which is right, and ends at one of `until` or after `max_new_tokens`.
    """

    prompt: str
    options: tuple[str, ...] = ()
    right: int = 0
    answers: tuple[str, ...] = ()
    until: tuple[str, ...] = UNTIL
    max_new_tokens: int = MAX_NEW_TOKENS
    where: str = ""

    @property
    def solved(self) -> str:
        """The prompt with a right answer."""
        return self.prompt + DELIMITER + (self.options[self.right] if self.options else self.answers[0])


@dataclass(frozen=True)
class Task:
    """A file. `hash` is the SHA-256 of its bytes, and with shots of those and of the text of the shots."""

    name: str
    kind: str
    items: list[Item]
    hash: str
    file: str
    shots: int = 0


def read_task(path: str | Path) -> Task:
    """Read a task file whole. Raises DataError for rows that are none, DamagedDataError for what is not UTF-8 or JSON,
    OSError for a file that cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DamagedDataError(f"byte {error.start} is not UTF-8", where=str(path)) from None
    items: list[Item] = []
    kinds: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DamagedDataError(f"is not JSON: {error}", where=where) from None
        if not isinstance(row, dict):
            raise DataError(f"a row is a JSON object, got {show(row)}", where=where)
        kind = _kind_of(row, where)
        if kinds and kind != kinds[0]:
            raise DataError(f"a {kind} row in a file of {kinds[0]} rows", where=where)
        kinds.append(kind)
        items.append(READERS[kind](row, where))
    if not items:
        raise DataError("holds no rows", where=str(path), hint="a task file has one JSON object per line")
    return Task(path.stem, kinds[0], items, hashlib.sha256(data).hexdigest(), str(path))


def with_shots(task: Task, count: int) -> Task:
    """The task with `count` solved examples before every prompt, the same for all.

    They are the first rows of NAME.shots.jsonl beside the file, or where there is none the first rows of the task, which
    are then not scored. DataError for minimal pairs, which have no prompt, and where rows are missing.
    """
    if count == 0:
        return task
    if task.kind == PAIRS:
        raise DataError("minimal pairs have no prompt, so they take no shots", where=task.file)
    beside = Path(task.file).with_name(task.name + ".shots.jsonl")
    pool = read_task(beside) if beside.is_file() else task
    if pool.kind != task.kind:
        raise DataError(f"holds {pool.kind} rows and the task {task.kind} rows", where=pool.file)
    items = task.items if pool is not task else task.items[count:]
    if len(pool.items) < count or not items:
        raise DataError(
            f"{count} shots were asked for, and there are {len(pool.items)} rows in all",
            where=pool.file,
            hint=f"ask for fewer shots, or write more solved examples into {beside}",
        )
    text = "".join(item.solved + BETWEEN for item in pool.items[:count])
    digest = hashlib.sha256((task.hash + text).encode()).hexdigest()
    items = [replace(item, prompt=text + item.prompt) for item in items]
    return replace(task, items=items, hash=digest, shots=count)


def limited(task: Task, limit: int | None) -> Task:
    """The first `limit` rows."""
    return task if limit is None else replace(task, items=task.items[:limit])


def _kind_of(row: dict[str, Any], where: str) -> str:
    for kind in (PAIRS, CHOICE, GENERATION):  # a choice has all keys of a generation
        if all(key in row for key in KEYS[kind]):
            return kind
    known = sorted({key for keys in KEYS.values() for key in keys})
    hints = [did_you_mean(key, known) for key in row if key not in known]
    forms = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in KEYS.items())
    raise DataError(
        f"the row has the keys {', '.join(sorted(row)) or '(none)'}, which make no task ({forms})",
        where=where,
        hint=next((hint for hint in hints if hint), ""),
    )


def _pair(row: dict[str, Any], where: str) -> Item:
    good, bad = (_text(row, key, where, empty=False) for key in KEYS[PAIRS])
    if good == bad:
        raise DataError("sentence_good and sentence_bad are the same", where=where)
    return Item("", (good, bad), where=where)


def _choice(row: dict[str, Any], where: str) -> Item:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"choices must be a list of at least two texts, got {show(choices)}", where=where)
    for choice in choices:
        _check_text("a choice", choice, where, empty=False)
    if len(set(choices)) < len(choices):
        raise DataError(f"two choices are the same: {show(choices)}", where=where)
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"answer must be one of the choices or its number, from 0 to {len(choices) - 1}, got {show(answer)}",
            where=where,
        )
    return Item(_text(row, "prompt", where), tuple(choices), answer, where=where)


def _generation(row: dict[str, Any], where: str) -> Item:
    answers, until, new = row["answer"], row.get("until"), row.get("max_new_tokens")
    answers = [answers] if isinstance(answers, str) else answers
    until = list(UNTIL) if until is None else until
    new = MAX_NEW_TOKENS if new is None else new
    for name, texts in (("answer", answers), ("until", until)):
        if not isinstance(texts, list) or (name == "answer" and not texts):
            raise DataError(f"{name} must be a list of texts, got {show(texts)}", where=where)
        for text in texts:
            # blanks may end an answer, but are none
            _check_text(name, text, where, empty=name == "until" and text != "")
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise DataError(f"max_new_tokens must be at least 1, got {show(new)}", where=where)
    prompt = _text(row, "prompt", where)
    return Item(prompt, answers=tuple(answers), until=tuple(until), max_new_tokens=new, where=where)


def _text(row: dict[str, Any], key: str, where: str, *, empty: bool = True) -> str:
    return _check_text(key, row[key], where, empty=empty)


def _check_text(name: str, value: Any, where: str, *, empty: bool) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DataError(
            f"{name} must be a text{'' if empty else ' that is not empty'}, got {show(value)}", where=where
        )
    return value


READERS: dict[str, Callable[[dict[str, Any], str], Item]] = {
    PAIRS: _pair,
    CHOICE: _choice,
    GENERATION: _generation,
}


def names_of(tasks: Sequence[Task]) -> list[str]:
    """Names under which results are kept; DataError where two files have the same."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two task files are called {name}; rename one, as results are kept by name")
    return names
