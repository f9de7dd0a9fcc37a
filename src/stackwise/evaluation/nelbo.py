"""The likelihood bound of masked diffusion on held-out text, by two estimators that agree in expectation.

    NELBO per token = 1/P sum over n = 1..P of E over masks of n [ mean over masked i of -log p(x_i | z) ]   (count)
                    = 1/P E_t [ r'(t)/r(t) sum over masked i of -log p(x_i | z_t) ]                          (t)

P is the number of tokens of a window that may be masked: not padding, not special. Where stacks own intervals of noise
each row is judged by the owner of its share n/P. See `objectives.diffusion` for the sources of the formulas.
Shape letters: B rows, T positions, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stackwise.data.corpus import TokenSplit
from stackwise.data.reference import tokens_besides
from stackwise.evaluation.windows import Progress, Windows, unseen
from stackwise.model.modes import eval_mode
from stackwise.objectives import masking
from stackwise.objectives.base import IGNORE, Example, Noise
from stackwise.objectives.denoiser import Denoiser
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.intervals import Intervals
from stackwise.objectives.masked import Keys, Vocabulary
from stackwise.training.device import computing_in
from stackwise.training.validate import bits_per_byte

SEED = 1234
QUARTERS = Intervals.linear(4)
"""How the bound of a model is split whose stacks own no intervals."""


@dataclass(frozen=True)
class Part:
    """The bound over the masked shares low < share <= high. The `nats_per_token` of all parts add to the total.

    `width` is the part of the counts that lies there, `masked_loss` the mean loss of a masked token there (null where
    no count does): their product is `nats_per_token`.
    """

    low: float
    high: float
    nats_per_token: float
    width: float
    masked_loss: float | None


@dataclass(frozen=True)
class Nelbo:
    """An upper bound of the negative log likelihood of a split, and how sure the estimate is.

    `nats_per_token` is divided by the `tokens` that may be masked. `standard_error` is that of the mean over passes, of
    which each masks anew; null with one pass. `perplexity` is exp of the bound; `bits_per_byte` is null where the split
    does not know its bytes.
    """

    nats_per_token: float
    standard_error: float | None
    perplexity: float
    bits_per_byte: float | None
    parts: tuple[Part, ...]
    tokens: int
    windows: int
    passes: int
    seq_len: int
    estimator: str
    label: str = "bound"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def nelbo(
    denoiser: Denoiser,
    split: TokenSplit,
    *,
    seq_len: int,
    batch_size: int = 8,
    batches: int | None = None,
    passes: int = 4,
    special_ids: Sequence[int] = (),
    packing: bool = True,
    doc_mask: bool = True,
    pad_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    estimator: str = "count",
    counts: str = "even",
    progress: Progress = unseen,
) -> Nelbo:
    """The bound over the windows of a split, in order, without overlap.

    `estimator` count: in every pass window i masks exactly n random positions, n from a permutation of the windows;
    permutation and positions come from one CPU generator. `counts` even: n = 1 + floor(P (perm[i] + u) / W), u in [0, 1),
    so that each count is equally likely. modulo: n = 1 + (perm[i] mod P), a common protocol, whose light masks come up
    more often unless P divides W. t: each token is masked by itself at a time of its window, stratified over the
    windows. `special_ids` are never masked.

    The same call gives the same figure, and in float32 it does not depend on `batch_size` (up to 1e-6). `batches`
    limits the work to `batches * batch_size` windows spread over the split; `progress` hears of every batch. ValueErrors: an unknown estimator or kind of
    counts; stacks that learned single shares of masked tokens; those of `Windows`.
    """
    if estimator not in ("count", "t"):
        raise ValueError(f"unknown estimator {estimator!r}; allowed: count, t")
    if counts not in ("even", "modulo"):
        raise ValueError(f"unknown counts {counts!r}; allowed: even, modulo")
    if denoiser.points:
        raise ValueError(
            "a bound needs every share of masked tokens, and each stack learned a single one "
            "(training.progressive.time_step_mask_fractions); evaluation.masked.masked_scores scores them there"
        )
    rack = denoiser.rack
    windows = Windows(
        rack,
        split,
        seq_len=seq_len,
        batch_size=batch_size,
        batches=batches,
        packing=packing,
        doc_mask=doc_mask,
        pad_id=pad_id,
        passes=passes,
        progress=progress,
    )
    common: dict[str, Any] = {
        "vocabulary": Vocabulary(rack.spec.vocab_size, denoiser.mask_id, tuple(special_ids)),
        "seed": SEED,
        "corruption": "absorbing",
        "shifted": denoiser.shifted,
    }
    objective: Diffusion = Diffusion(**common, form="t")
    if estimator == "count":
        objective = ByCount(**common, windows=windows.count, seq_len=seq_len, even=counts == "even")
    intervals = denoiser.intervals or QUARTERS
    sums = torch.zeros(passes, intervals.count, 3, dtype=torch.float64)  # nats, weighted masks, tokens
    with torch.no_grad(), eval_mode(rack), computing_in(dtype, rack.device):
        for number in range(passes):
            for batch in windows.of_pass(number):
                _add(sums[number], denoiser, objective.corrupt(batch), intervals)
    return _result(sums, intervals, windows, split, special_ids, denoiser.mask_id, estimator)


def _add(sums: Tensor, denoiser: Denoiser, example: Example, intervals: Intervals) -> None:
    """Add the rows of an example to the sums [N, 3] of the intervals that their shares belong to."""
    assert example.totals is not None
    assert example.weights is not None
    assert example.scored is not None
    masked = (example.labels != IGNORE).sum(1).double()
    present = example.totals.double()
    shares = masked / present.clamp_min(1)
    # A row with nothing masked costs nothing; it still needs an owner.
    nll, _ = denoiser.judge(example.to(denoiser.rack.device), shares.clamp_min(1e-9))
    rows = torch.zeros_like(present)
    rows.index_add_(0, example.scored // example.labels.shape[1], nll.double().cpu())
    weights = example.weights.double()
    owners = torch.tensor([intervals.owner(max(share, 1e-9)) for share in shares.tolist()])
    sums.index_add_(0, owners, torch.stack((rows * weights, masked * weights, present), 1))


def _result(
    sums: Tensor,
    intervals: Intervals,
    windows: Windows,
    split: TokenSplit,
    special_ids: Sequence[int],
    mask_id: int,
    estimator: str,
) -> Nelbo:
    passes = len(sums)
    tokens = float(sums[0, :, 2].sum())
    if not tokens:
        raise ValueError("there is nothing to evaluate: every token of the split is special or padding")
    of_passes = sums[:, :, 0].sum(1) / tokens
    nats, masks = (sums[:, :, :2].mean(0) / tokens).unbind(1)
    parts = []
    for d in range(intervals.count):
        loss = float(nats[d] / masks[d]) if masks[d] else None
        parts.append(Part(*intervals.of(d), float(nats[d]), float(masks[d]), loss))
    mean = float(of_passes.mean())
    return Nelbo(
        nats_per_token=mean,
        standard_error=float(of_passes.std() / math.sqrt(passes)) if passes > 1 else None,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=bits_per_byte(mean, tokens_besides(split, (*special_ids, mask_id)), split.n_bytes),
        parts=tuple(parts),
        tokens=int(tokens),
        windows=windows.count,
        passes=passes,
        seq_len=windows.seq_len,
        estimator=estimator,
    )


@dataclass
class ByCount(Diffusion):
    """Diffusion whose masks are those of the count estimator: `draws` of a batch is the pass, `places` the windows.

    Passes come in order, from 0. See `nelbo` for the number of masks of a window.
    """

    windows: int = 0
    seq_len: int = 0
    even: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._generator = torch.Generator().manual_seed(self.seed)
        self._at = -1

    def _masks(
        self, keys: Keys, eligible: Tensor, u: Tensor, noise: Noise | None, counts: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._turn_to(int(keys.draws[0]))
        present = eligible.sum(1)
        if self.even:
            counts = 1 + (present * self._levels[keys.places]).long()
        else:
            counts = 1 + self._order[keys.places] % present.clamp_min(1)
        return super()._masks(keys, eligible, u, noise, counts)

    def _choose(self, keys: Keys, eligible: Tensor, counts: Tensor) -> Tensor:
        return masking.choose(self._scores[keys.places], eligible, counts)

    def _turn_to(self, number: int) -> None:
        """Draw the numbers of a pass, whole, so that they do not depend on how the windows are batched."""
        if number not in (self._at, self._at + 1):
            raise ValueError(f"pass {number} after pass {self._at}: the passes come in order")
        if number == self._at + 1:
            self._order = torch.randperm(self.windows, generator=self._generator)
            if self.even:
                shifts = torch.rand(self.windows, generator=self._generator, dtype=torch.float64)
                self._levels = (self._order + shifts) / self.windows
            size = (self.windows, self.seq_len)
            self._scores = torch.rand(size, generator=self._generator, dtype=torch.float64)
            self._at = number
