"""Tasks to fine-tune on: folders of train.jsonl, dev.jsonl and, where there, test.jsonl, one JSON object per line.

    one text       {"sentence": "...", "label": 1}
    a pair         {"sentence1": "...", "sentence2": "...", "label": 1}
    a number       {"sentence": "...", "score": 3.5}, also of a pair
    tagging        {"tokens": ["...", "..."], "tags": ["O", "PER"]}

What a row is shows in its keys; further keys are ignored. All rows of a task are of one kind. A label is a number or a
text; those of the scored rows must occur in training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config.errors import did_you_mean, show
from stackwise.data.errors import DamagedDataError, DataError

CLASSES, NUMBER, TAGS = "classes", "number", "tags"
SPLITS = ("dev", "test", "holdout")
"""What can be scored. holdout: the last tenth of the training rows, which are then not trained on."""
HOLDOUT = 10

KEYS = {
    ("tokens", "tags"): TAGS,
    ("sentence1", "sentence2", "label"): CLASSES,
    ("sentence1", "sentence2", "score"): NUMBER,
    ("sentence", "label"): CLASSES,
    ("sentence", "score"): NUMBER,
}
"""Keys of a row -> kind. The texts are all but the last, the target is the last."""

Target = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Texts and what is to be found in them.

    Of each row one text, two of a pair, or its words where they are tagged; and the number of its class, a number, or
    the numbers of the tags of its words.
    """

    texts: tuple[tuple[str, ...], ...]
    targets: tuple[Target, ...]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Task:
    """`labels` are the classes or tags in their order. `hashes`: name of a file -> SHA-256 of its bytes."""

    name: str
    kind: str
    pair: bool
    labels: tuple[str, ...]
    train: Rows
    scored: Rows
    split: str
    hashes: Mapping[str, str]


def task_folder(name: str, data: Path | None) -> Path:
    """The folder of a task: inside `data` where that is given, else a path. DataError where there is none."""
    path = Path(name) if data is None else data / name
    if (path / "train.jsonl").is_file():
        return path
    known = sorted(p.parent.name for p in path.parent.glob("*/train.jsonl"))
    near = did_you_mean(path.name, known)
    raise DataError(
        "there is no task: a task is a folder with train.jsonl and dev.jsonl",
        where=str(path),
        hint=near
        or (f"tasks there: {', '.join(known)}" if known else "give --data FOLDER, the folder of the tasks"),
    )


def read_task(folder: str | Path, split: str = "dev") -> Task:
    """Read the training rows of a task and those to score, "dev", "test" or "holdout".

    Raises DataError for rows that are none and for a split that is missing, DamagedDataError for what is not UTF-8 or
    JSON, OSError for a file that cannot be read.
    """
    folder = Path(folder)
    names = ["train"] if split == "holdout" else ["train", split]
    files = [folder / f"{name}.jsonl" for name in names]
    for file in files[1:]:
        if not file.is_file():
            raise DataError(
                f"the task {folder.name} has no {file.name}",
                where=str(folder),
                hint="--split says which rows are scored: " + ", ".join(SPLITS),
            )
    read = [_rows_of(file) for file in files]
    return made_task(
        folder.name, [(str(file), rows) for file, (rows, _) in zip(files, read, strict=True)], split,
        {file.name: digest for file, (_, digest) in zip(files, read, strict=True)},
    )  # fmt: skip


def made_task(
    name: str, read: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], split: str, hashes: Mapping[str, str]
) -> Task:
    """A task from rows: those to train on, and unless the split is "holdout" those to score, each with where they are from."""
    keys, first = None, f"{read[0][0]}:1"
    for where, rows in read:
        if not rows:
            raise DataError("holds no rows", where=where, hint="a task file has one JSON object per line")
        for number, row in enumerate(rows, 1):
            found = _keys_of(row, f"{where}:{number}")
            if keys is not None and found != keys:
                raise DataError(
                    f"a row of {' and '.join(found)}, but those before it have {' and '.join(keys)}",
                    where=f"{where}:{number}",
                )
            keys = found
    assert keys is not None, "there are rows"
    kind = KEYS[keys]
    parts = [
        [
            (_texts_of(row, keys, f"{where}:{n}"), _target_of(row, keys, f"{where}:{n}"))
            for n, row in enumerate(rows, 1)
        ]
        for where, rows in read
    ]
    if split == "holdout":
        cut = len(parts[0]) - len(parts[0]) // HOLDOUT
        parts = [parts[0][:cut], parts[0][cut:]]
        if not parts[1]:
            raise DataError(f"{cut} rows are too few to hold out a tenth", where=first)
    labels: tuple[str, ...] = ()
    if kind != NUMBER:
        labels = tuple(sorted({label for _, target in parts[0] for label in _labels(target)}, key=_order))
        if len(labels) < 2:
            raise DataError(
                f"all rows have the label {labels[0]!r}, so there is nothing to learn", where=first
            )
        for number, (_, target) in enumerate(parts[1], 1):
            for label in _labels(target):
                if label not in labels:
                    raise DataError(
                        f"the label {label!r} does not occur in training; labels there: {', '.join(labels)}",
                        where=f"{read[-1][0]}, scored row {number}",
                    )
    coded = [
        Rows(tuple(texts for texts, _ in part), tuple(_coded(target, labels, kind) for _, target in part))
        for part in parts
    ]
    return Task(name, kind, keys[0] == "sentence1", labels, coded[0], coded[1], split, dict(hashes))


def _rows_of(path: Path) -> tuple[list[Mapping[str, Any]], str]:
    """The rows of a file, and the SHA-256 of its bytes."""
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DamagedDataError(f"byte {error.start} is not UTF-8", where=str(path)) from None
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DamagedDataError(f"is not JSON: {error}", where=f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise DataError(f"a row is a JSON object, got {show(row)}", where=f"{path}:{number}")
        rows.append(row)
    return rows, hashlib.sha256(data).hexdigest()


def _keys_of(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    for keys in KEYS:
        if all(key in row for key in keys):
            return keys
    wanted = "; or ".join(", ".join(keys) for keys in KEYS)
    near = next(
        (hint for key in row if (hint := did_you_mean(key, sorted({k for keys in KEYS for k in keys})))), ""
    )
    raise DataError(
        f"has the keys {', '.join(row) or 'of nothing'}; a row has {wanted}", where=where, hint=near
    )


def _texts_of(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> tuple[str, ...]:
    if KEYS[keys] == TAGS:
        words, tags = row["tokens"], row["tags"]
        for key, value in (("tokens", words), ("tags", tags)):
            if not isinstance(value, list) or not value:
                raise DataError(f"{key} must be a list that is not empty, got {show(value)}", where=where)
        if len(words) != len(tags):
            raise DataError(f"{len(words)} tokens have {len(tags)} tags", where=where)
        texts = words
    else:
        texts = [row[key] for key in keys[:-1]]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{' and '.join(keys[:-1])} must be text that is not empty, got {show(text)}", where=where
            )
    return tuple(texts)


def _target_of(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> Any:
    value, key = row[keys[-1]], keys[-1]
    if key == "score":
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"score must be a finite number, got {show(value)}", where=where)
        return float(value)
    for label in value if key == "tags" else [value]:
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise DataError(f"{key} must be a whole number or a text, got {show(label)}", where=where)
    return tuple(map(str, value)) if key == "tags" else str(value)


def _labels(target: Any) -> Iterable[str]:
    return (target,) if isinstance(target, str) else target


def _order(label: str) -> tuple[float, str]:
    """Numbers by size, then texts."""
    return (float(label), "") if label.lstrip("-").isdigit() else (math.inf, label)


def _coded(target: Any, labels: tuple[str, ...], kind: str) -> Target:
    if kind == NUMBER:
        return float(target)
    if kind == TAGS:
        return tuple(labels.index(label) for label in target)
    return labels.index(target)
