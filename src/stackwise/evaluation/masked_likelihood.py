"""How likely a masked model finds continuations: as a pseudo-likelihood or as a bound.

    mlm                 sum over i of log p(y_i | x, y without i)          (Salazar et al. 2020, 1910.14659)  pseudo
    masked diffusion    -1/n sum over k of n/k E over masks of k [ sum over masked i of -log p(y_i | z) ]    bound

n is the number of tokens of y that may be hidden; x stays visible. Shape letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stackwise.data.errors import DataError
from stackwise.evaluation.nelbo import SEED
from stackwise.evaluation.requests import BATCH_TOKENS, Request, Score, check_length, sum_by_owner
from stackwise.evaluation.windows import Progress, unseen
from stackwise.model.modes import eval_mode
from stackwise.objectives import bits, masking
from stackwise.objectives.base import IGNORE, Example
from stackwise.objectives.denoiser import Denoiser
from stackwise.objectives.masked import scored_positions
from stackwise.training.device import computing_in


class MaskedScorer:
    """Pseudo where `mc_samples` is null: each token hidden by itself. Else a bound from so many draws of masks.

    The numbers of hidden tokens are spread evenly from 1 to n; what a draw hides depends on the key of the request.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        special_ids: Sequence[int] = (),
        *,
        start: int | None = None,
        batch_size: int | None = None,
        mc_samples: int | None = None,
    ) -> None:
        if mc_samples is not None and mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
        self.denoiser, self.start, self.batch_size, self.mc_samples = denoiser, start, batch_size, mc_samples
        self.special = (*special_ids, denoiser.mask_id)
        self.label = "pseudo" if mc_samples is None else "bound"

    def score(
        self,
        requests: Sequence[Request],
        *,
        greedy: bool = False,
        wheres: Sequence[str] | None = None,
        progress: Progress = unseen,
    ) -> list[Score]:
        """In the order of the requests. DataError for a continuation without a token that can be hidden, or too long."""
        rack = self.denoiser.rack
        limit = rack.spec.max_seq_len
        by_length: dict[int, list[Hidden]] = {}
        cuts = []
        for number, (request, where) in enumerate(zip(requests, wheres or [""] * len(requests), strict=True)):
            check_length(request, limit, where)
            ids = torch.tensor((request.context + request.continuation)[-limit:])
            cuts.append(len(request.context) + len(request.continuation) - len(ids))
            by_length.setdefault(len(ids), []).extend(self._draws(number, ids, request, greedy, where))
        nats = torch.zeros(len(requests), dtype=torch.float64)
        best = torch.ones(len(requests), dtype=torch.bool)
        read, total = 0, sum(map(len, by_length.values()))
        with torch.no_grad(), eval_mode(rack), computing_in(torch.float32, rack.device):
            # Rows of one length need no padding, which a rack might see.
            for length, rows in by_length.items():
                step = self.batch_size or max(1, BATCH_TOKENS // length)
                for at in range(0, len(rows), step):
                    some = rows[at : at + step]
                    self._add(some, nats, best)
                    read += len(some)
                    progress(read, total)
        return [
            Score(-value, right if greedy else None, cut)
            for value, right, cut in zip(nats.tolist(), best.tolist(), cuts, strict=True)
        ]

    def _draws(self, number: int, ids: Tensor, request: Request, greedy: bool, where: str) -> list[Hidden]:
        """The rows that a request takes."""
        ordinary = masking.eligible_positions(ids[None], None, self.special)[0]
        eligible = ordinary.clone()
        eligible[: len(ids) - len(request.continuation)] = False
        if self.denoiser.shifted:
            eligible[0] = False
        n, present = int(eligible.sum()), int(ordinary.sum())
        if not n:
            raise DataError("a continuation has no token that could be hidden: all are special", where=where)
        judged = True  # whether the row decides about `greedy`
        if self.mc_samples is None:
            hidden = torch.zeros(n, len(ids), dtype=torch.bool)
            hidden[torch.arange(n), eligible.nonzero()[:, 0]] = True
            return [Hidden(number, ids, row, 1.0, 1 / present, judged) for row in hidden]
        draws = torch.arange(self.mc_samples)
        keys = torch.full_like(draws, request.key)
        u = bits.uniforms(SEED, keys[:1], draws[:1], 1, "counts of a continuation")[0, 0]
        counts = 1 + (n * ((draws + u) / self.mc_samples)).long().clamp_max(n - 1)
        # Counted from the end of the context: texts that are compared hide the same places behind it.
        places = int(eligible.nonzero()[0, 0])
        scores = torch.zeros(self.mc_samples, len(ids), dtype=torch.int64)
        scores[:, places:] = bits.scores(SEED, keys, draws, len(ids) - places, "masks of a continuation")
        chosen = masking.choose(scores, eligible.expand_as(scores), counts)
        rows = [
            Hidden(number, ids, row, n / (k * self.mc_samples), k / present, False)
            for row, k in zip(chosen, counts.tolist(), strict=True)
        ]
        return [*rows, Hidden(number, ids, eligible, 0.0, n / present, True)] if greedy else rows

    def _add(self, rows: list[Hidden], nats: Tensor, best: Tensor) -> None:
        ids, hidden = torch.stack([row.ids for row in rows]), torch.stack([row.hidden for row in rows])
        labels = torch.where(hidden, ids, IGNORE)
        if self.denoiser.shifted:
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        scored = scored_positions(labels)
        example = Example(ids.masked_fill(hidden, self.denoiser.mask_id), labels, scored=scored)
        shares = torch.tensor([row.share for row in rows], dtype=torch.float64)
        nll, right = self.denoiser.judge(example.to(self.denoiser.rack.device), shares)
        owners = scored // ids.shape[1]
        right = right.cpu() | (labels.flatten()[scored] == IGNORE)
        losses, hits = sum_by_owner(nll, right, owners, len(rows))
        for row, loss, hit in zip(rows, losses, hits, strict=True):
            nats[row.request] += row.weight * loss
            if row.judges:
                best[row.request] &= hit


@dataclass(frozen=True)
class Hidden:
    """A row of one request: `ids` [T], of which `hidden` [T] are masked, and what its loss counts."""

    request: int
    ids: Tensor
    hidden: Tensor
    weight: float
    share: float
    judges: bool
