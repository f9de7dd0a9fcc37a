"""Rules, notes and derived choices of the section `objective` and of what the objective asks of a model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import program_of, rule, stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

OBJECTIVE = "training.progressive.training_objective"
TIME = "training.progressive.time_interpretation"


def masks(config: StackWiseConfig) -> bool:
    """Whether the objective hides tokens."""
    return config.training.progressive.training_objective in ("mlm", "diffusion")


def diffuses(config: StackWiseConfig) -> bool:
    """Whether the objective is masked diffusion."""
    return config.training.progressive.training_objective == "diffusion"


def label_of(config: StackWiseConfig, noise: tuple[float, float] | None = None) -> str:
    """What a held-out loss is: the exact likelihood, a bound of it, or pseudo (no likelihood of the text).

    Over a range of `noise` a bound becomes part of a bound; at a single share there is none.
    """
    keys = config.training.progressive
    points = time_of(config) == "depth" and keys.time_step_mask_fractions is not None
    if keys.training_objective == "diffusion" and not points and corruption_of(config) == "absorbing":
        if noise is None:
            return "bound"  # it needs every share of masked tokens, and tokens that are hidden
        return "part of a bound" if noise[0] < noise[1] else "pseudo"
    return "exact" if keys.training_objective == "clm" else "pseudo"


def time_of(config: StackWiseConfig) -> str:
    """What the time of the noise means: depth, input or none."""
    given = config.training.progressive.time_interpretation
    if given != "auto":
        return given
    return "depth" if masks(config) and program_of(config) in ("prepend", "independent") else "none"


def corruption_of(config: StackWiseConfig) -> str:
    """bert, absorbing or gaussian."""
    given = config.objective.corruption
    if given != "auto":
        return given
    mlm = config.training.progressive.training_objective == "mlm"
    return "bert" if mlm and time_of(config) == "none" else "absorbing"


def writes_samples(config: StackWiseConfig) -> bool:
    """Whether a run can write text: by a causal objective, or by masked diffusion over mask tokens at every share.

    Where only some of the stacks train among which time is shared out, no share of noise beyond theirs is known.
    """
    progressive = config.training.progressive
    if progressive.training_objective != "diffusion":
        return progressive.training_objective == "clm"
    some = progressive.train_stacks is not None and len(progressive.train_stacks) < stacks_at_the_end(config)
    return corruption_of(config) == "absorbing" and not (time_of(config) == "depth" and some)


def scored_share(config: StackWiseConfig, noise: tuple[float, float] | None = None) -> float:
    """Share of the positions that the head reads, on average; `noise`: range of the share of corrupted ones."""
    keys = config.objective
    if not masks(config):
        return 1.0
    if noise is None:
        if config.training.progressive.training_objective == "mlm" and time_of(config) != "input":
            return keys.mask_fraction
        clipped = config.training.progressive.training_objective == "diffusion" and keys.weight == "clipped"
        noise = (keys.clip[0], keys.clip[1]) if clipped else (0.0, 1.0)
    return (noise[0] + noise[1]) / 2


@rule(OBJECTIVE, TIME)
def time_needs_noise(config: StackWiseConfig) -> Problem | None:
    given = config.training.progressive.time_interpretation
    if masks(config) or given in ("auto", "none"):
        return None
    objective = config.training.progressive.training_objective
    return Problem(
        TIME, f"the objective {objective} has no noise", given, "auto, none", f"or set {OBJECTIVE}"
    )


@rule("objective.mask_prob", "objective.random_prob", "objective.keep_prob")
def bert_shares_sum_to_one(config: StackWiseConfig) -> Problem | None:
    keys = config.objective
    total = keys.mask_prob + keys.random_prob + keys.keep_prob
    if abs(total - 1) < 1e-9:
        return None
    hint = "they are the shares of the chosen tokens that are masked, replaced at random and kept"
    message = f"with objective.random_prob and objective.keep_prob sums to {total:g}, not 1"
    return Problem("objective.mask_prob", message, keys.mask_prob, hint=hint)


@rule("objective.clip")
def clip_rises(config: StackWiseConfig) -> Problem | None:
    low, high = config.objective.clip
    if low < high:
        return None
    return Problem("objective.clip", "does not rise", config.objective.clip, "[lowest, highest]")


@rule("objective.min_mask_fraction", "objective.max_mask_fraction")
def mask_fractions_rise(config: StackWiseConfig) -> Problem | None:
    keys = config.objective
    if keys.min_mask_fraction <= keys.max_mask_fraction:
        return None
    message = f"is above objective.max_mask_fraction {keys.max_mask_fraction:g}"
    return Problem("objective.min_mask_fraction", message, keys.min_mask_fraction)


@rule("objective.noise_table", "objective.noise_schedule")
def table_is_a_schedule(config: StackWiseConfig) -> Problem | None:
    keys = config.objective
    if keys.noise_schedule != "table":
        return None
    if keys.noise_table is None:
        return Problem("objective.noise_table", "the table schedule needs its shares", None, "[0, ..., 1]")
    table = keys.noise_table
    if table[0] != 0 or table[-1] != 1 or any(b <= a for a, b in pairwise(table)):
        return Problem(
            "objective.noise_table", "does not rise from 0 to 1 at every entry", table, "[0, ..., 1]"
        )
    return None


@rule("objective.corruption", "objective.predict", OBJECTIVE)
def corruption_fits(config: StackWiseConfig) -> list[Problem]:
    keys, found = config.objective, []
    if keys.predict == "noise" and keys.corruption != "gaussian":
        hint = "set objective.corruption to gaussian"
        found.append(
            Problem("objective.predict", "only gaussian corruption adds noise", "noise", "token", hint)
        )
    if keys.corruption == "bert" and config.training.progressive.training_objective == "diffusion":
        message = "diffusion hides tokens; random and kept ones would have no likelihood bound"
        found.append(Problem("objective.corruption", message, "bert", "auto, absorbing, gaussian"))
    return found


@rule("objective.mask_token_id", "model.vocab_size", OBJECTIVE)
def mask_token_is_in_the_vocabulary(config: StackWiseConfig) -> Problem | None:
    given, size = config.objective.mask_token_id, config.model.vocab_size
    if not masks(config) or given is None or size is None or given < size:
        return None
    return Problem("objective.mask_token_id", "is outside the vocabulary", given, f"0 to {size - 1}")


@rule("objective.loss_fn", OBJECTIVE)
def loss_function_is_for_custom(config: StackWiseConfig) -> Problem | None:
    objective = config.training.progressive.training_objective
    if config.objective.loss_fn is None or objective == "custom":
        return None
    hint = f"set {OBJECTIVE} to custom"
    return Problem(
        "objective.loss_fn",
        f"the objective {objective} has its own loss",
        config.objective.loss_fn,
        hint=hint,
    )


def _unless(*objectives: str) -> Callable[[StackWiseConfig], bool]:
    return lambda c: c.training.progressive.training_objective not in objectives


def _why(config: StackWiseConfig) -> str:
    return f"{OBJECTIVE} is {config.training.progressive.training_objective}"


def _why_no_clip(config: StackWiseConfig) -> str:
    return "objective.weight is not clipped" if diffuses(config) else _why(config)


MASKED_KEYS = (
    "corruption",
    "predict",
    "mask_token_id",
    "add_mask_token",
    "noise_schedule",
    "t_sampling",
    "min_mask_fraction",
    "max_mask_fraction",
    "mask_schedule_type",
    "mask_draws",
    "nested_masks",
    "random_length_fraction",
    "target_shift",
)
DIFFUSION_KEYS = ("weight", "form")


def _reads_schedule(config: StackWiseConfig) -> bool:
    """Whether shares of noise and times are turned into each other."""
    if time_of(config) == "input":
        return True
    return diffuses(config) and (config.objective.form == "t" or corruption_of(config) == "gaussian")


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str | Callable[[StackWiseConfig], str]]] = [
    *(
        (f"tracking.{name}", lambda c: not writes_samples(c), "the run does not learn to write text")
        for name in ("sample_interval", "sample_prompt")
    ),
    *((f"objective.{name}", _unless("mlm", "diffusion"), _why) for name in MASKED_KEYS),
    *((f"objective.{name}", _unless("diffusion"), _why) for name in DIFFUSION_KEYS),
    ("objective.mask_fraction", _unless("mlm"), _why),
    (
        "objective.mask_fraction",
        lambda c: c.training.progressive.training_objective == "mlm" and time_of(c) != "none",
        "the time of the noise says how much is masked",
    ),
    *(
        (
            f"objective.{name}",
            lambda c: corruption_of(c) != "bert" or not masks(c),
            "only bert corruption reads it",
        )
        for name in ("mask_prob", "random_prob", "keep_prob")
    ),
    (
        "objective.noise_power",
        lambda c: c.objective.noise_schedule != "power",
        "objective.noise_schedule is not power",
    ),
    (
        "objective.noise_table",
        lambda c: c.objective.noise_schedule != "table",
        "objective.noise_schedule is not table",
    ),
    (
        "objective.noise_schedule",
        lambda c: masks(c) and not _reads_schedule(c),
        "shares of masked tokens are drawn evenly, which needs no time; form t, gaussian corruption and a model that is "
        "told the time read it",
    ),
    (
        "objective.t_sampling",
        lambda c: c.training.progressive.training_objective == "mlm" and time_of(c) == "none",
        "every row has the same share of masked tokens",
    ),
    ("evaluation.passes", _unless("mlm", "diffusion"), _why),
    ("objective.clip", lambda c: not diffuses(c) or c.objective.weight != "clipped", _why_no_clip),
    ("objective.t_eps", lambda c: c.objective.form != "t", "objective.form is not t"),
]

ADVICE: list[tuple[Callable[[StackWiseConfig], bool], str]] = [
    (
        lambda c: masks(c) and c.model.attention["attention_mode"] == "causal",
        f"{OBJECTIVE} hides tokens, but model.attention_preset is causal: a hidden token is predicted from the tokens "
        "before it alone; bert_style attends in both directions",
    ),
]
