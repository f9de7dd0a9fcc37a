"""What guessing without a model costs: reference lines to hold a loss against."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from stackwise.data.corpus import TokenSplit

AT_A_TIME = 1 << 22
"""Tokens counted in one go: counting widens them to 8 bytes each."""


@dataclass(frozen=True)
class Reference:
    """Nats per token of two guesses that look at no context, and how often the commonest token is right.

    uniform: every ordinary token is equally likely, log V. unigram: as often as in the training text.
    """

    uniform: float
    unigram: float
    unigram_accuracy: float

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        return f"uniform {self.uniform:.3f}, unigram {self.unigram:.3f} nats per token"


def counts_of(split: TokenSplit) -> npt.NDArray[np.int64]:
    """How often each id occurs, [largest id + 1]."""
    counts = np.zeros(split.max_id + 1, np.int64)
    for start in range(0, split.n_tokens, AT_A_TIME):
        counts += np.bincount(split.tokens[start : start + AT_A_TIME], minlength=len(counts))
    return counts


def tokens_besides(split: TokenSplit, unscored: Collection[int]) -> int:
    """How many tokens have other ids than `unscored`."""
    counts = counts_of(split)
    counts[[i for i in unscored if i < len(counts)]] = 0
    return int(counts.sum())


def reference_lines(
    train: TokenSplit, held_out: TokenSplit, vocab_size: int, unscored: Collection[int] = ()
) -> Reference:
    """Guesses learned from one split, scored on the other. `unscored` ids are never guessed and never scored.

    Every token counts once more than it occurs in training, so that one that does not occur there has a finite loss.
    A vocabulary or a held-out split without a token to score is a ValueError.
    """
    kept = np.ones(vocab_size, bool)
    kept[[i for i in unscored if i < vocab_size]] = False
    seen, wanted = (np.zeros(vocab_size, np.int64) for _ in range(2))
    for counts, split in ((seen, train), (wanted, held_out)):
        split.check_vocabulary(vocab_size)
        counts[: split.max_id + 1] = counts_of(split)
    seen, wanted = seen[kept], wanted[kept]
    if not wanted.sum():
        raise ValueError("there is nothing to score: every token of the held-out split is special")
    share = (seen + 1) / (seen.sum() + len(seen))
    return Reference(
        uniform=math.log(len(seen)),
        unigram=float(-(wanted * np.log(share)).sum() / wanted.sum()),
        unigram_accuracy=float(wanted[seen.argmax()] / wanted.sum()),
    )
