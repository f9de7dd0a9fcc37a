"""Zero-shot and few-shot scores of a model on tasks from local files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stackwise.data.errors import DataError
from stackwise.data.tokenizers import Tokenizer
from stackwise.evaluation.requests import Score, Scorer, encode
from stackwise.evaluation.tasks import DELIMITER, GENERATION, PAIRS, Task
from stackwise.evaluation.windows import Progress, unseen

Write = Callable[[str, Sequence[str], int], str]
"""Continues a prompt greedily up to one of some texts, or for so many tokens; gives the new text."""


@dataclass(frozen=True)
class Metric:
    """A mean over the rows, and its standard error (null of a single row)."""

    value: float
    standard_error: float | None

    @classmethod
    def of(cls, hits: Sequence[bool]) -> Metric:
        """The share of hits."""
        n, mean = len(hits), sum(hits) / len(hits)
        return cls(mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None)


@dataclass(frozen=True)
class TaskResult:
    """Scores of a task. `chance` is the accuracy of a guess, null where it is unknown. `n`: rows scored; `cut`: prompts
    whose beginning was left out, because they are longer than the model can read. `task_hash`: see `Task.hash`.
    """

    task: str
    kind: str
    n: int
    shots: int
    metrics: dict[str, Metric]
    chance: float | None
    cut: int
    task_hash: str
    label: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def run_task(
    task: Task,
    scorer: Scorer,
    tokenizer: Tokenizer,
    write: Write | None = None,
    *,
    progress: Progress = unseen,
) -> TaskResult:
    """Score all rows. DataError, naming the row, for text that the tokenizer cannot spell or the model cannot read.

    A task of generation without `write` is a ValueError. `progress` hears how much of the work is done.
    """
    if task.kind == GENERATION:
        if write is None:
            raise ValueError(f"the task {task.name} generates text, which needs `write`")
        return _generated(task, write, progress)
    requests, wheres = [], []
    for key, item in enumerate(task.items):
        for option in item.options:
            try:
                requests.append(encode(tokenizer, item.prompt, DELIMITER + option, scorer.start, key))
            except DataError as error:
                raise DataError(error.message, where=item.where, hint=error.hint) from None
            wheres.append(item.where)
    scores = iter(scorer.score(requests, wheres=wheres, progress=progress))
    best, by_bytes, cut = [], [], 0
    for item in task.items:
        found: list[Score] = [next(scores) for _ in item.options]
        nats = [score.nats for score in found]
        per_byte = [value / len(text.encode()) for value, text in zip(nats, item.options, strict=True)]
        best.append(_wins(nats, item.right, task.kind))
        by_bytes.append(_wins(per_byte, item.right, task.kind))
        cut += any(score.cut for score in found)
    chance = sum(1 / len(item.options) for item in task.items) / len(task.items)
    metrics = {"acc": Metric.of(best), "acc_norm": Metric.of(by_bytes)}
    return TaskResult(
        task.name, task.kind, len(best), task.shots, metrics, chance, cut, task.hash, scorer.label
    )


def _wins(values: list[float], right: int, kind: str) -> bool:
    """Whether the right option is the likeliest. A tie goes to the first of several choices, and to nobody in a pair."""
    if kind == PAIRS:
        return values[right] > max(value for i, value in enumerate(values) if i != right)
    return values.index(max(values)) == right


def _generated(task: Task, write: Write, progress: Progress) -> TaskResult:
    equal, within = [], []
    for number, item in enumerate(task.items, 1):
        try:
            text = write(item.prompt, item.until, item.max_new_tokens)
        except DataError as error:
            raise DataError(error.message, where=item.where, hint=error.hint) from None
        progress(number, len(task.items))
        equal.append(text.strip() in [answer.strip() for answer in item.answers])
        within.append(any(answer.strip() in text for answer in item.answers))
    metrics = {"exact_match": Metric.of(equal), "contains": Metric.of(within)}
    return TaskResult(task.name, task.kind, len(equal), task.shots, metrics, None, 0, task.hash, "greedy")
