"""Settings of generation."""

from stackwise.config.base import Settings
from stackwise.config.types import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Text,
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
