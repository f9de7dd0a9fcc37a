"""Objectives that hide tokens of a row and predict them from the others: mlm and masked diffusion.

Which tokens, how many and what replaces them depends on (seed, sample id, draw) alone, through counter-based bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from stackwise.objectives import bits, masking
from stackwise.objectives.base import IGNORE, Example, Noise, input_ids_of
from stackwise.objectives.gaussian import corrupt_embeddings, gaussian_noise
from stackwise.objectives.head import head_loss
from stackwise.objectives.schedules import NoiseSchedule

if TYPE_CHECKING:
    from stackwise.model.own_io import Head

EVALUATION = 0x5EED_0F_E7A1
"""Mixed into the seed of corruptions for evaluation."""


@dataclass(frozen=True)
class Vocabulary:
    """`size` counts the mask token; `special` ids (padding, ends, the mask itself) are never corrupted or drawn."""

    size: int
    mask_id: int
    special: tuple[int, ...] = ()

    @property
    def hidden(self) -> tuple[int, ...]:
        """Ids that do not stand for text."""
        return (*self.special, self.mask_id)


@dataclass
class Masked:
    """What mlm and diffusion share. `corruption`: bert, absorbing or gaussian; `predict`: token or noise.

    `shifted`: the hidden state before a token predicts it, as in a causal model, whose weights can so be tuned on; the
    first token of a row is then never hidden. `tells_time`: the model is given the time, one for each sample or
    (`one_time`) for the batch. The rest are keys of `objective`.
    """

    vocabulary: Vocabulary
    seed: int
    corruption: str
    predict: str = "token"
    bert: tuple[float, float, float] = (0.8, 0.1, 0.1)
    draws: int | None = None
    nested: bool = True
    z_loss: float = 0.0
    shifted: bool = False
    schedule: NoiseSchedule = field(default_factory=lambda: NoiseSchedule("linear"))
    t_sampling: str = "stratified"
    tells_time: bool = False
    one_time: bool = False
    length_fraction: float = 0.0
    name: str = ""
    causal: bool = False
    _ordinary: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._ordinary = masking.ordinary_tokens(self.vocabulary.size, self.vocabulary.hidden)

    # --- corruption --------------------------------------------------------------------------------------------

    def corrupt(
        self, batch: Mapping[str, Tensor], noise: Noise | None = None, counts: Tensor | None = None
    ) -> Example:
        """See `Objective.corrupt`."""
        ids, keys = input_ids_of(batch), Keys.of(batch, self.draws)
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        if self.length_fraction:
            mask = cut_to_random_length(ids, mask, keys, self.seed, self.length_fraction)
        eligible = self.eligible(ids, mask, batch.get("document_ids"))
        u = keys.times(self.seed, self.t_sampling)
        if self.one_time:
            u = u[:1].expand_as(u)
        masks, extra = self._masks(keys, eligible, u, noise, counts)
        labels = torch.where(masks, ids, IGNORE)
        if self.shifted:
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        example = Example(
            ids if self.corruption == "gaussian" else self.replaced(ids, masks, keys),
            labels,
            mask,
            batch.get("position_ids"),
            batch.get("document_ids"),
            batch.get("sample_ids"),
            batch.get("token_type_ids"),
            draws=keys.draws if self.draws != 1 else None,
            scored=scored_positions(labels),
        )
        return example._replace(**extra)

    def eligible(self, ids: Tensor, mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
        """bool [B, T]: the tokens that may be corrupted, of clean ids [B, T]; `mask` is 0 at padding."""
        eligible = masking.eligible_positions(ids, mask, self.vocabulary.hidden)
        return eligible & precedes(ids, document_ids) if self.shifted else eligible

    def masks_of(self, example: Example) -> Tensor:
        """bool [B, T]: the tokens of an example that are corrupted."""
        masks = example.labels != IGNORE
        # A shifted objective scores a token one position before it.
        return torch.nn.functional.pad(masks[:, :-1], (1, 0)) if self.shifted else masks

    def _masks(
        self, keys: Keys, eligible: Tensor, u: Tensor, noise: Noise | None, counts: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """bool [B, T], and further fields of the example. `u` float64 [B] in (0, 1] says how much of each row."""
        raise NotImplementedError

    def _time_of(self, shares: Tensor) -> Tensor:
        """The times at which shares of the tokens are masked."""
        times: Tensor = self.schedule.inverse(1 - shares.double())
        return times

    def _choose(self, keys: Keys, eligible: Tensor, counts: Tensor) -> Tensor:
        """Exactly min(count, eligible) positions of every row."""
        stream = "masks" if self.nested else "masks by count"
        draws = keys.draws if self.nested else keys.draws * 1_000_003 + counts
        scores = bits.scores(self.seed, keys.ids, draws, eligible.shape[1], stream)
        return masking.choose(scores, eligible, counts)

    def replaced(self, ids: Tensor, masks: Tensor, keys: Keys) -> Tensor:
        if self.corruption == "absorbing":
            return ids.masked_fill(masks, self.vocabulary.mask_id)
        n = ids.shape[1]
        kinds = bits.uniforms(self.seed, keys.ids, keys.draws, n, "kind of corruption")
        others = bits.uniforms(self.seed, keys.ids, keys.draws, n, "random token")
        random_ids = masking.random_tokens(others, self._ordinary)
        return masking.bert(ids, masks, self.vocabulary.mask_id, random_ids, kinds, self.bert)

    def embedded(self, x_BTD: Tensor, example: Example) -> Tensor:
        """Embeddings with noise on the scored positions, where the corruption is gaussian."""
        if self.corruption != "gaussian":
            return x_BTD
        return corrupt_embeddings(x_BTD, example.labels != IGNORE, *self._noise_of(example))

    def _noise_of(self, example: Example) -> tuple[Tensor, int, Tensor, Tensor]:
        assert example.rates is not None
        assert example.sample_ids is not None
        draws = torch.zeros_like(example.sample_ids) if example.draws is None else example.draws
        return example.rates, self.seed, example.sample_ids, draws

    # --- loss --------------------------------------------------------------------------------------------------

    def loss(
        self, hidden: Tensor, head: Head, example: Example, rows_per_chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Objective.loss`. Predicting noise, the hidden states are compared with it."""
        if self.predict == "noise":
            return self._noise_loss(hidden, example), self.weight(example)
        total = head_loss(
            hidden,
            head,
            example,
            banned=self.banned,
            z_loss=self.z_loss,
            rows_per_chunk=rows_per_chunk,
        )
        return total, self.weight(example)

    def _noise_loss(self, hidden: Tensor, example: Example) -> Tensor:
        """Squared error of the noise on chosen embeddings, mean over the width."""
        _, seed, sample_ids, draws = self._noise_of(example)
        noise = gaussian_noise(hidden.shape, seed, sample_ids, draws).to(hidden)
        errors = (hidden - noise).float().square().mean(-1) * (example.labels != IGNORE)
        per_row = errors.sum(1)
        return (per_row if example.weights is None else per_row * example.weights).sum()

    @property
    def banned(self) -> int | None:
        """A token that is never predicted."""
        return None

    def for_evaluation(self) -> Self:
        """The same with corruptions that training never meets, a fresh one in every pass."""
        return replace(self, seed=self.seed ^ EVALUATION, draws=None, length_fraction=0.0, z_loss=0.0)

    def weight(self, example: Example) -> Tensor:
        """What the loss is divided by."""
        return (example.labels != IGNORE).sum() if example.totals is None else example.totals.sum()


@dataclass
class MaskedLM(Masked):
    """The objective `mlm`: a fixed share of the tokens is corrupted; divided by their number (Devlin et al. 2019).

    Padding and special tokens are never corrupted, drawn or scored; special ones are seen, padding is not.
    With a range of noise (a stack that owns an interval) the share is drawn from it.
    """

    fraction: float = 0.15
    name: str = "mlm"

    def _masks(
        self, keys: Keys, eligible: Tensor, u: Tensor, noise: Noise | None, counts: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        present = eligible.sum(1)
        if counts is None and noise is None and not self.tells_time:
            counts = (self.fraction * present.double()).round().long().clamp_min(1)
        elif counts is None:
            counts = counts_over(noise, u, present)
        masks = self._choose(keys, eligible, counts)
        shares = masks.sum(1) / present.clamp_min(1)
        extra = {"time": self._time_of(shares).float()} if self.tells_time else {}
        if self.corruption == "gaussian":
            extra["rates"] = shares.float()
        return masks, extra


def scored_positions(labels: Tensor) -> Tensor:
    """int64 [n]: where labels [B, T] are, counted through all rows, and a few positions more, which have none.

    Their number is rounded up to one of about 32, for products of ever new shapes cost time and memory.
    """
    scored = labels != IGNORE
    listed, size = scored.flatten().nonzero().squeeze(1), scored.numel()
    step = max(32, 2 ** (size // 32).bit_length())
    more = min(-len(listed) % step, size - len(listed))
    return torch.cat((listed, (~scored).flatten().nonzero().squeeze(1)[:more]))


def over(noise: Noise | None, u: Tensor) -> Tensor:
    """Shares of masked tokens, even over a range (null: all)."""
    low, high = noise or (0.0, 1.0)
    return low + (high - low) * u


def counts_over(noise: Noise | None, u: Tensor, present: Tensor) -> Tensor:
    """Numbers of masked tokens of `present`, even over a range of shares (null: all), at least 1.

    n with (n - 1)/present < share <= n/present; over a range of one share, the number nearest to it.
    """
    wanted = over(noise, u) * present.double()
    exact = noise is not None and noise[0] == noise[1]
    return (wanted.round() if exact else wanted.ceil()).long().clamp_min(1)


def precedes(ids: Tensor, document_ids: Tensor | None) -> Tensor:
    """bool [B, T]: which tokens have one before them in their document."""
    follows = torch.ones_like(ids, dtype=torch.bool)
    follows[:, 0] = False
    if document_ids is not None:
        follows[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    return follows


def cut_to_random_length(ids: Tensor, mask: Tensor | None, keys: Keys, seed: int, fraction: float) -> Tensor:
    """The attention mask [B, T] with a share of the rows cut to a length drawn evenly from 1 to T."""
    n = ids.shape[1]
    u = bits.uniforms(seed, keys.ids, keys.draws, 2, "random length")
    lengths = torch.where(u[:, 0] < fraction, 1 + (u[:, 1] * n).long(), n)
    kept = torch.arange(n) < lengths[:, None]
    return kept if mask is None else kept & mask


@dataclass(frozen=True)
class Keys:
    """What the random numbers of a batch are keyed by, each int64 [B]."""

    ids: Tensor
    draws: Tensor
    places: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], repeats: int | None) -> Keys:
        """`repeats`: corruptions of a sample, which come again; then its time does not depend on its place either."""
        rows = len(batch["input_ids"])
        ids = batch.get("sample_ids", torch.arange(rows))
        draws = batch.get("draws", torch.zeros_like(ids))
        places = batch.get("places", ids)
        return cls(ids, draws, places) if repeats is None else cls(ids, draws % repeats, ids)

    def times(self, seed: int, kind: str) -> Tensor:
        """float64 [B] in (0, 1]."""
        return masking.times(seed, self.ids, self.draws, self.places, kind)
