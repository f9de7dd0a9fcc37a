"""What is asked of a scorer, texts as token ids, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stackwise.data.errors import DataError
from stackwise.data.tokenizers import Tokenizer
from stackwise.evaluation.windows import Progress, unseen

BATCH_TOKENS = 2048
"""Tokens that are computed together where the number of rows is not given."""


@dataclass(frozen=True)
class Request:
    """Token ids: how likely is `continuation` after `context`? `key` chooses what a bound hides: the same for texts that
    are compared with each other.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    key: int = 0


@dataclass(frozen=True)
class Score:
    """`nats`: the log-likelihood. `greedy`: every token is the likeliest (of a bound: with the whole continuation hidden;
    null where nobody asked). `cut`: tokens of the context that were left out, at its beginning, for it to fit.
    """

    nats: float
    greedy: bool | None
    cut: int = 0


class Scorer(Protocol):
    """`label`: exact, pseudo or bound. `start`: the token that stands before a text without context, if any.

    `wheres`: where each request comes from, for errors. `progress` hears of rows: those that are read, and all.
    """

    @property
    def label(self) -> str: ...

    @property
    def start(self) -> int | None: ...

    def score(
        self,
        requests: Sequence[Request],
        *,
        greedy: bool = False,
        wheres: Sequence[str] | None = None,
        progress: Progress = unseen,
    ) -> list[Score]: ...


def encode(tokenizer: Tokenizer, context: str, continuation: str, start: int | None, key: int = 0) -> Request:
    """The tokens of both texts as they are tokenized together; blanks at the end of the context go to the continuation.

    So does lm-eval. Without a context the continuation comes after `start`.
    """
    bare = context.rstrip()
    if bare:
        context, continuation = bare, context[len(bare) :] + continuation
    elif context:
        context, continuation = "", context + continuation
    if not context:
        ids = tokenizer.encode(continuation)
        lead = () if start is None or ids[:1] == [start] else (start,)
        split = len(lead) or int(start is not None)
        whole = (*lead, *ids)
        return Request(whole[:split], whole[split:], key)
    ids, split = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    return Request(tuple(ids[:split]), tuple(ids[split:]), key)


def check_length(request: Request, limit: int, where: str) -> None:
    if not request.continuation:
        raise DataError("a continuation is empty: its tokens are those of its context", where=where)
    if len(request.continuation) > limit:
        raise DataError(
            f"a continuation has {len(request.continuation)} tokens, more than max_seq_len = {limit}",
            where=where,
            hint="the model cannot read it whole; leave the row out",
        )


def sum_by_owner(values: Tensor, right: Tensor, owners: Tensor, count: int) -> tuple[list[float], list[bool]]:
    """Sums of the values of each owner, and whether all of its are right."""
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owners, values.double().cpu())
    wrong = torch.zeros(count, dtype=torch.int64).index_add_(0, owners, (~right.cpu()).long())
    return sums.tolist(), (wrong == 0).tolist()
