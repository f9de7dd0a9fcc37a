"""Settings of the objective: what is corrupted, how much, how the loss is weighted; and of time."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt, MaxLen, MinLen

from stackwise.config.base import Settings
from stackwise.config.types import (
    Allowed,
    Flag,
    Float,
    Index,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    UnitFloat,
    UpToOne,
)


class ObjectiveSettings(Settings):
    """How tokens are corrupted and how the loss is weighted; `training.progressive.training_objective` names the objective."""

    mask_fraction: UpToOne = 0.15
    """Share of the ordinary tokens of a row that mlm corrupts, where no stack owns an interval of noise."""
    corruption: Literal["auto", "bert", "absorbing", "gaussian"] = "auto"
    """What happens to a chosen token. bert: mask, random token or itself; absorbing: mask; gaussian: noise on its embedding. auto: bert for mlm at one share, else absorbing."""
    predict: Literal["token", "noise"] = "token"
    """What is learned at a chosen position: the clean token (cross-entropy), or under gaussian corruption the noise (squared error)."""
    mask_prob: UnitFloat = 0.8
    """Share of the chosen tokens that bert corruption replaces by the mask token; the three shares sum to 1."""
    random_prob: UnitFloat = 0.1
    """Share of the chosen tokens that it replaces by a random ordinary token."""
    keep_prob: UnitFloat = 0.1
    """Share of the chosen tokens that it leaves as they are."""
    mask_token_id: NonNegativeInt | None = None
    """Id of the mask token. null: the tokenizer's, else a new row of embedding and head."""
    add_mask_token: Flag = True
    """Add a mask token where the tokenizer has none."""
    noise_schedule: Literal["linear", "cosine", "exponential", "power", "table"] = "linear"
    """Share of masked tokens r(t) over time t from 0 to 1: t; 1 - cos(pi t / 2); (e^t - 1) / (e - 1); t^noise_power; noise_table."""
    noise_power: PositiveFloat = 1.0
    """Exponent of the power schedule."""
    noise_table: Annotated[list[UnitFloat], MinLen(2)] | None = None
    """Rising shares at equal distances of time, from 0 to 1, between which the table schedule interpolates. null: for the other schedules."""
    weight: Literal["nelbo", "uniform", "clipped"] = "nelbo"
    """Weight of the masked tokens. nelbo: that of the likelihood bound; uniform: 1 for each; clipped: as nelbo, with shares drawn from `clip`."""
    clip: Annotated[list[UnitFloat], MinLen(2), MaxLen(2)] = [0.3, 0.8]
    """[lowest, highest] share of masked tokens under weight clipped, in stages that have no noise of their own."""
    form: Literal["count", "t"] = "count"
    """How a row is masked. count: an exact number of its tokens; t: each token by itself, with probability r(t)."""
    t_sampling: Literal["stratified", "antithetic", "uniform"] = "stratified"
    """How times are drawn. stratified: any run of consecutive samples covers (0, 1] evenly; antithetic: in pairs u and 1 - u; uniform: each by itself."""
    t_eps: Share = 1e-3
    """Smallest time of the t form, whose weight 1/t has no bound."""
    min_mask_fraction: UnitFloat = 0.15
    """Lightest of the point masks that a schedule makes, and the first boundary of exponential intervals."""
    max_mask_fraction: UnitFloat = 0.9
    """Heaviest of the point masks that a schedule makes."""
    mask_schedule_type: Literal["linear", "cosine", "exponential"] = "linear"
    """How point masks rise from the head to the embedding."""
    mask_draws: PositiveInt | None = None
    """Different corruptions of a sample, which come again in turn. null: a fresh one at every visit."""
    nested_masks: Flag = True
    """Masks of one sample and draw lie inside each other: a smaller share masks a subset of a larger one's."""
    random_length_fraction: UnitFloat = 0.0
    """Share of the samples that are cut to a random length, the rest of the row being padding."""
    target_shift: Flag = False
    """The hidden state before a token predicts it, as in a causal model: for tuning one on under mlm or diffusion."""
    loss_fn: Annotated[str, Allowed("module:function")] | None = None
    """Loss of the custom objective: (logits [n, V], targets [n]) -> losses [n]. null: cross-entropy."""
    z_loss: NonNegativeFloat = 0.0
    """Adds z_loss * (log of the sum of exponentials of the logits)^2, which keeps logits small."""


class TimeKeys(Settings):
    """Keys of `training.progressive` that this room reads: what the time of the noise means."""

    time_interpretation: Literal["auto", "depth", "input", "none"] = "auto"
    """depth: each stack owns an interval of noise, heavy noise next to the embedding; input: the model is told the time; none: neither. auto: depth for prepend and independent with a masked objective, else none."""
    time_per_stack: PositiveInt = 100
    """Time steps that each stack owns. In input mode they count the rows of a learned table."""
    num_time_steps: PositiveInt | None = None
    """Time steps in all, the horizon. null: stacks * `time_per_stack`, which in depth mode is the only one. In input mode the rows of a learned table."""
    stack_time_mapping: Literal["linear", "exponential", "custom"] = "linear"
    """Intervals of noise of the stacks. linear: equal shares of masked tokens; exponential: each heavier one a multiple of the lighter; custom: `time_boundaries`."""
    time_boundaries: Annotated[list[UnitFloat], MinLen(2)] | None = None
    """Rising shares of masked tokens from 0 to 1, one more than stacks: the custom intervals, lightest first. null: `stack_time_mapping` makes them."""
    time_overlap: Annotated[Float, Ge(0), Lt(0.5)] = 0.05
    """How much wider than its interval the noise is that a stack trains on, on both sides, as a share of the interval."""
    time_step_mask_fractions: Annotated[
        list[UnitFloat] | dict[Index, UnitFloat] | Literal["schedule"] | None,
        Allowed("list, lightest first; {step: fraction}; schedule"),
    ] = None
    """One share of masked tokens per stack in place of intervals; no likelihood bound exists then. schedule: from `objective.min_mask_fraction` to `objective.max_mask_fraction`. null: intervals."""
    time_embedding_dim: PositiveInt | None = None
    """Width of the time features in input mode. null: `model.d_model`."""
    time_encoding_type: Literal["sinusoidal", "learned"] = "sinusoidal"
    """Time features in input mode: sine and cosine of the time, or a learned table of `num_time_steps` rows."""
    time_sampling: Literal["sample", "batch"] = "sample"
    """In input mode, whether each sample has a time of its own or a batch has one."""
    time_conditioning: Literal["add", "adaln"] = "add"
    """How the time enters in input mode: added to the embedding, or as scale and shift of every norm."""
