"""Settings of mixtures of experts."""

from typing import Literal

from stackwise.config.base import Settings
from stackwise.config.types import Flag, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class MoeSettings(Settings):
    """Mixtures of experts in the place of dense feed-forwards; see `model.experts`."""

    n_experts: NonNegativeInt = 0
    """Experts of a layer, of which every token visits `top_k`. 0: dense feed-forwards."""
    top_k: PositiveInt = 2
    """Experts that a token visits, at most `n_experts`; all of them is the dense mixture."""
    n_shared: NonNegativeInt = 0
    """Experts that every token visits besides; together they are one feed-forward of as many times the width."""
    d_ff: PositiveInt | None = None
    """Width of an expert. null: that of the dense feed-forward in its place."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """What makes weights of the router's scores: a softmax over all experts, or a sigmoid of each."""
    normalise: Flag = True
    """Divide the weights of the chosen experts by their sum."""
    scale: PositiveFloat = 1.0
    """Factor on the weights of the chosen experts."""
    groups: PositiveInt = 1
    """Groups of experts of equal size; a token chooses `top_groups` of them first, and its experts among theirs."""
    top_groups: PositiveInt = 1
    """Groups that a token chooses, at most `groups`."""
    balancing: Literal["aux", "bias"] = "aux"
    """What keeps the experts evenly used: a loss of its own, or an offset on the scores by which experts are chosen, moved after every step."""
    aux_weight: NonNegativeFloat = 0.01
    """Weight of the balancing loss; 0 switches it off."""
    bias_rate: NonNegativeFloat = 0.001
    """How far a step moves the offsets under `balancing: bias`."""
    z_weight: NonNegativeFloat = 0.0
    """Weight of the router's z-loss, the squared log of its normaliser, which keeps scores small. 0: none."""
    every: PositiveInt = 1
    """Every so many layers, one has experts; the others are dense."""
    first_dense: NonNegativeInt = 0
    """Layers next to the embedding that are dense in any case."""

    def at(self, layer: int) -> bool:
        """Whether a layer, counted from the embedding, has experts: behind `first_dense`, the last of every `every`."""
        behind = layer - self.first_dense
        return self.n_experts > 0 and behind >= 0 and (behind + 1) % self.every == 0
