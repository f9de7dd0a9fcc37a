"""How likely a model finds continuations; here of a causal one, where that is exact.

    log p(y | x)  =  sum over i of log p(y_i | x, y_<i)

Shape letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stackwise.config.objective_rules import corruption_of, label_of, masks
from stackwise.config.root import StackWiseConfig
from stackwise.data.errors import DataError
from stackwise.data.tokenizers import Tokenizer
from stackwise.evaluation.masked_likelihood import MaskedScorer
from stackwise.evaluation.requests import BATCH_TOKENS, Request, Score, Scorer, check_length, sum_by_owner
from stackwise.evaluation.windows import Progress, unseen
from stackwise.kernels.linear_cross_entropy import chunk_rows
from stackwise.model.cache import RackCache
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import denoiser_of
from stackwise.training.device import computing_in

SHARED = 16
"""Tokens that all rows must begin with before it pays to read them once."""


def scorer_of(
    rack: Rack,
    config: StackWiseConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int | None = None,
    mc_samples: int = 16,
) -> Scorer:
    """The scorer of a rack that was trained by a resolved configuration. `batch_size`: rows; null: about 2048 tokens.

    A causal rack's texts begin with the end-of-text token, as lm-eval has it for models without a token of their own
    for that. DataError for a custom objective, and for gaussian corruption, under which no token is hidden.
    """
    start = tokenizer.start_ids()[0] if tokenizer.eos_id is None else tokenizer.eos_id
    objective = config.training.progressive.training_objective
    if objective == "clm":
        return CausalScorer(rack, start, batch_size=batch_size)
    if not masks(config):
        raise DataError(
            f"a run of the objective {objective} does not say how likely a text is; clm, mlm and diffusion do"
        )
    if corruption_of(config) == "gaussian":
        raise DataError("gaussian corruption hides no token, so this run cannot say how likely a text is")
    denoiser = denoiser_of(rack, config, tokenizer.special_ids)
    samples = mc_samples if label_of(config) == "bound" else None
    return MaskedScorer(
        denoiser,
        tokenizer.special_ids,
        start=start if denoiser.shifted else None,
        batch_size=batch_size,
        mc_samples=samples,
    )


class CausalScorer:
    """Exact. A row that is the beginning of another costs nothing, and what all rows begin with is read once."""

    label = "exact"

    def __init__(self, rack: Rack, start: int, *, batch_size: int | None = None) -> None:
        if not rack.is_causal:
            raise ValueError("exact likelihoods need a causal rack, and this one attends in both directions")
        self.rack, self.start, self.batch_size = rack, start, batch_size

    def score(
        self,
        requests: Sequence[Request],
        *,
        greedy: bool = False,
        wheres: Sequence[str] | None = None,
        progress: Progress = unseen,
    ) -> list[Score]:
        """In the order of the requests. DataError for a continuation that is empty or longer than `max_seq_len`."""
        limit = self.rack.spec.max_seq_len
        inputs, scores = [], [Score(0.0, None)] * len(requests)
        for request, where in zip(requests, wheres or [""] * len(requests), strict=True):
            check_length(request, limit, where)
            if not request.context:
                raise DataError(
                    "a causal model needs a token before the one that it shall predict", where=where
                )
            inputs.append((request.context + request.continuation)[:-1][-limit:])
        rows = _rows(inputs)
        firsts = [len(ids) - len(r.continuation) for ids, r in zip(inputs, requests, strict=True)]
        shared = self._shared(rows, firsts)
        with torch.no_grad(), eval_mode(self.rack), computing_in(torch.float32, self.rack.device):
            cache, read = self._read(rows, shared), 0
            for batch in _batches(rows, self.batch_size):
                hidden = self._hidden([ids for ids, _ in batch], shared, cache)
                members = [(row, i) for row, (_, listed) in enumerate(batch) for i in listed]
                nats, best = self._judge(hidden, members, inputs, requests, shared, greedy)
                for (_, i), value, right in zip(members, nats, best, strict=True):
                    r = requests[i]
                    cut = len(r.context) + len(r.continuation) - 1 - len(inputs[i])
                    scores[i] = Score(value, right if greedy else None, cut)
                read += len(batch)
                progress(read, len(rows))
        return scores

    def _shared(self, rows: list[Row], firsts: list[int]) -> int:
        """How many tokens at the beginning of all rows are read once: none of them predicts a scored token, of which
        `firsts` are the first positions.
        """
        if len(rows) < 2:
            return 0
        inputs = [ids for ids, _ in rows]
        common = min(_common(min(inputs), max(inputs)), *firsts)
        return common if common >= SHARED else 0

    def _read(self, rows: list[Row], shared: int) -> RackCache | None:
        """The cache of the shared tokens, with room for the rest of the longest row; null where nothing is shared."""
        if not shared:
            return None
        cache = self.rack.make_cache(1, max(len(ids) for ids, _ in rows))
        first = torch.tensor([rows[0][0][:shared]], device=self.rack.device)
        self.rack.forward_features(first, cache=cache)
        return cache

    def _hidden(self, rows: list[tuple[int, ...]], shared: int, cache: RackCache | None) -> Tensor:
        """[B, T - shared, D]: what the head reads behind the shared tokens. Padding is on the right, where nothing looks."""
        width = max(map(len, rows)) - shared
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens) - shared] = torch.tensor(tokens[shared:])
        repeated = None if cache is None else cache.repeated(len(rows))
        return self.rack.forward_features(ids.to(self.rack.device), cache=repeated)

    def _judge(
        self,
        hidden: Tensor,
        members: list[tuple[int, int]],
        inputs: list[tuple[int, ...]],
        requests: Sequence[Request],
        shared: int,
        greedy: bool,
    ) -> tuple[list[float], list[bool]]:
        width = hidden.shape[1]
        places: list[int] = []
        wanted: list[int] = []
        owners: list[int] = []
        for number, (row, i) in enumerate(members):
            tokens = requests[i].continuation
            first = row * width + len(inputs[i]) - len(tokens) - shared
            places += range(first, first + len(tokens))
            wanted += tokens
            owners += [number] * len(tokens)
        states = hidden.flatten(0, 1)[torch.tensor(places, device=hidden.device)]
        labels = torch.tensor(wanted, device=hidden.device)
        nats, right = [], []
        size = chunk_rows(self.rack.spec.vocab_size, device=hidden.device.type)
        for some, label in zip(states.split(size), labels.split(size), strict=True):
            logits = self.rack.io.head(some)
            logits = logits.float() if logits.dtype != torch.float64 else logits
            nats.append(logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(1))
            right.append(logits.argmax(1) == label if greedy else torch.zeros_like(label, dtype=torch.bool))
        return sum_by_owner(torch.cat(nats), torch.cat(right), torch.tensor(owners), len(members))


Row = tuple[tuple[int, ...], list[int]]
"""Input ids, and the numbers of the requests that are read from them."""


def _rows(inputs: list[tuple[int, ...]]) -> list[Row]:
    """The inputs of which none is the beginning of another."""
    rows: list[Row] = []
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        # In this order a beginning comes after all that begin with it.
        if rows and rows[-1][0][: len(inputs[i])] == inputs[i]:
            rows[-1][1].append(i)
        else:
            rows.append((inputs[i], [i]))
    return rows


def _batches(rows: list[Row], batch_size: int | None) -> Iterator[list[Row]]:
    """Rows of about one length together, the longest first."""
    rows = sorted(rows, key=lambda row: len(row[0]), reverse=True)
    at = 0
    while at < len(rows):
        size = batch_size or max(1, BATCH_TOKENS // len(rows[at][0]))
        yield rows[at : at + size]
        at += size


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two rows begin with in common; of the least and the greatest of many rows: all of them."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
