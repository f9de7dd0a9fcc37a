"""Settings of generation."""

from typing import Literal

from stackwise.config.base import Settings
from stackwise.config.types import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Text,
    UnitFloat,
    UpToOne,
)


class GenerationSettings(Settings):
    """How text is sampled, for `stackwise generate` and the samples of a run."""

    max_new_tokens: PositiveInt = 128
    """Longest continuation, in tokens."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0 is off."""
    top_p: UpToOne = 1.0
    """Sample from the smallest set of tokens that holds this probability; 1 is off."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the positive logits of tokens already present and multiplies the negative ones; 1 is off."""
    stop: list[Text] = []
    """Texts that end the continuation."""
    seed: Seed = 0
    """Seed of the sampling."""
    sampler: Literal["ancestral", "confidence", "threshold", "remask", "unroll", "stream"] = "confidence"
    """How a model that sees both directions fills masked positions. ancestral: at random, as the noise run backwards; confidence: the surest first; threshold: all that are sure enough; remask: fill everything, then mask the least likely again; unroll: one pass per stack's interval of noise; stream: the same in a single pass through the stacks."""
    steps: PositiveInt = 64
    """Steps of ancestral, confidence and remask; those that fill nothing cost nothing."""
    grid: Literal["cosine", "linear"] = "cosine"
    """Share of masked positions over the steps. cosine: few are filled at first, while little is known; linear: the same number in each."""
    block_length: PositiveInt | None = None
    """Fill in blocks of so many positions, from left to right, each whole before the next. null: all at once."""
    threshold: UnitFloat = 0.9
    """Probability above which the threshold sampler fills a position; the surest is filled in any case."""
