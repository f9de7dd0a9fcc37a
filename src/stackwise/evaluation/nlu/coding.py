"""Rows of a task as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stackwise.data.errors import DataError
from stackwise.data.tokenizers import Tokenizer
from stackwise.evaluation.nlu.tasks import NUMBER, TAGS, Rows, Task
from stackwise.model.heads import IGNORE, padded


@dataclass(frozen=True)
class Coded:
    """`ids` of each row: those of its text, or of both texts of a pair. `targets`: numbers, or a label per token.

    `cut`: how many texts lost their end.
    """

    ids: list[tuple[list[int], ...]]
    targets: list[Any]
    kind: str
    cut: int

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> list[int]:
        return [sum(map(len, row)) for row in self.ids]


@dataclass(frozen=True)
class Batch:
    """Rows of `Coded` side by side: (ids, mask), of a pair (ids, mask, ids, mask), and what is to be found."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(tuple(t.to(device) for t in self.inputs), self.targets.to(device))


def coded(task: Task, rows: Rows, tokenizer: Tokenizer, *, max_tokens: int) -> Coded:
    """Ids of the rows of a task, each text cut to `max_tokens`; the label of a word is that of its first token."""
    ids: list[tuple[list[int], ...]] = []
    targets: list[Any] = []
    cut = 0
    for number, (texts, target) in enumerate(zip(rows.texts, rows.targets, strict=True), 1):
        try:
            pieces = [
                tokenizer.encode(f" {text}" if task.kind == TAGS and i else text)
                for i, text in enumerate(texts)
            ]
        except DataError as error:
            raise DataError(f"row {number}: {error}", where=f"task {task.name}") from None
        if not all(pieces):
            raise DataError(f"row {number} has a text without tokens", where=f"task {task.name}")
        if task.kind == TAGS:
            flat = [i for piece in pieces for i in piece]
            assert isinstance(target, tuple)
            marks = [
                label if first else IGNORE
                for piece, label in zip(pieces, target, strict=True)
                for first in [True] + [False] * (len(piece) - 1)
            ]
            pieces = [flat]
            targets.append(marks[:max_tokens])
        else:
            targets.append(target)
        cut += sum(len(piece) > max_tokens for piece in pieces)
        ids.append(tuple(piece[:max_tokens] for piece in pieces))
    return Coded(ids, targets, task.kind, cut)


def joined(rows: Coded, between: Sequence[int], max_tokens: int) -> Coded:
    """Pairs in one row each, `between` in the middle; the longer text loses its end where both are too long."""
    out: list[tuple[list[int], ...]] = []
    cut = rows.cut
    for first, second in rows.ids:
        room = max_tokens - len(between)
        a, b = first, second
        if len(a) + len(b) > room:
            cut += 1
            short = min(len(a), len(b), room // 2)
            a, b = (a[: room - short], b[:short]) if len(a) > len(b) else (a[:short], b[: room - short])
        out.append(([*a, *between, *b],))
    return Coded(out, rows.targets, rows.kind, cut)


def batch_of(rows: Coded, chosen: Sequence[int]) -> Batch:
    """The chosen rows."""
    inputs: list[Tensor] = []
    for side in range(len(rows.ids[0])):
        ids, mask, _ = padded([rows.ids[i][side] for i in chosen])
        inputs += [ids, mask]
    targets = [rows.targets[i] for i in chosen]
    if rows.kind == TAGS:
        marks = torch.full(inputs[0].shape, IGNORE)
        for row, labels in enumerate(targets):
            marks[row, : len(labels)] = torch.tensor(labels)
        return Batch(tuple(inputs), marks)
    return Batch(
        tuple(inputs), torch.tensor(targets, dtype=torch.float32 if rows.kind == NUMBER else torch.int64)
    )


def shuffled(rows: Coded, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Every row once, in batches of rows of about the same length, both drawn from the generator."""
    lengths = rows.lengths()
    noise = torch.rand(len(rows), generator=generator).tolist()
    order = sorted(range(len(rows)), key=lambda i: lengths[i] * (1 + 0.5 * noise[i]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    for at in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[at]


def by_length(rows: Coded, size: int) -> Iterator[list[int]]:
    """Every row once, from short to long."""
    lengths = rows.lengths()
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]
