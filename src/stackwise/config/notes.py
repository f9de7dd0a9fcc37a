"""Keys that are set but without effect in the chosen mode, and choices worth a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.rules import stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def notes_of(config: StackWiseConfig) -> list[str]:
    """One sentence each. A key counts as set when it was given and differs from its default."""
    inert = [
        f"{key} has no effect: {why}"
        for key, applies, why in INERT
        if _is_set(config, key) and applies(config)
    ]
    return inert + [text for applies, text in ADVICE if applies(config)]


def grows(config: StackWiseConfig) -> bool:
    """Whether the run adds a stack to one that has trained."""
    return config.training.progressive.enabled and stacks_at_the_end(config) > 1


def tunes_jointly(config: StackWiseConfig) -> bool:
    """Whether the run ends with a joint phase."""
    joint = config.training.progressive.joint_tuning
    return grows(config) if joint == "auto" else config.training.progressive.enabled and joint


def trains_the_trunk(config: StackWiseConfig) -> bool:
    """Whether older stacks ever train again."""
    return grows(config) and (
        config.training.progressive.trunk_strategy == "trainable" or tunes_jointly(config)
    )


def _is_set(config: StackWiseConfig, key: str) -> bool:
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return name in section.model_fields_set and getattr(section, name) != default


def _optimizer_is(*names: str) -> Callable[[StackWiseConfig], bool]:
    return lambda config: config.training.optimizer.optimizer_type in names


def _end_to_end(config: StackWiseConfig) -> bool:
    return not config.training.progressive.enabled


def _greedy(config: StackWiseConfig) -> bool:
    return config.generation.temperature == 0


GROWTH_KEYS = (
    "building_mode",
    "max_stacks",
    "target_stacks",
    "trunk_strategy",
    "new_stack_init",
    "train_head",
    "train_embedding",
    "global_head_blocks",
    "joint_tuning",
    "joint_tuning_fraction",
    "growth_optimizer",
    "rewarmup_fraction",
    "stage_weights",
)

INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    (
        "model.attention_custom",
        lambda c: c.model.attention_preset != "custom",
        "model.attention_preset is not custom",
    ),
    ("model.rope_theta", lambda c: c.model.positions != "rope", "positions are not rotary"),
    (
        "model.architecture.n_stacks",
        lambda c: stacks_at_the_end(c) != c.model.architecture.n_stacks,
        "training.progressive.target_stacks wins",
    ),
    ("training.epochs_per_stack", lambda c: c.training.max_steps is not None, "training.max_steps wins"),
    ("training.decay_fraction", lambda c: c.training.lr_schedule != "wsd", "training.lr_schedule is not wsd"),
    (
        "training.min_lr_ratio",
        lambda c: c.training.lr_schedule == "constant",
        "the learning rate is constant",
    ),
    ("training.new_stack_lr", lambda c: not grows(c), "no stack is added to a trained one"),
    ("training.trunk_lr", lambda c: not trains_the_trunk(c), "older stacks never train again"),
    ("training.optimizer.adam_lr", _optimizer_is("AdamW", "Adam", "SGD"), "the optimizer is not Muon"),
    ("training.optimizer.momentum", _optimizer_is("AdamW", "Adam"), "only SGD and Muon have it"),
    ("training.optimizer.betas", _optimizer_is("SGD"), "SGD has momentum instead"),
    ("training.optimizer.eps", _optimizer_is("SGD"), "SGD does not divide by moments"),
    *(
        (f"training.progressive.{name}", _end_to_end, "training.progressive.enabled is false")
        for name in GROWTH_KEYS
    ),
    (
        "training.progressive.joint_tuning_fraction",
        lambda c: c.training.progressive.enabled and not tunes_jointly(c),
        "there is no joint phase",
    ),
    ("data.eval_fraction", lambda c: c.data.eval_path is not None, "data.eval_path wins"),
    ("data.doc_mask", lambda c: not c.data.packing, "without packing a row holds one document"),
    ("data.text_key", lambda c: c.data.source in ("stdlib", "text"), "the source has no fields"),
    ("generation.top_k", _greedy, "temperature 0 is greedy"),
    ("generation.top_p", _greedy, "temperature 0 is greedy"),
    ("generation.seed", _greedy, "temperature 0 is greedy"),
]
"""Key, when it has no effect, and why."""

ADVICE: list[tuple[Callable[[StackWiseConfig], bool], str]] = [
    (
        lambda c: grows(c) and c.model.tie_embeddings is True,
        "model.tie_embeddings: the tied head counts as embedding and stays fixed between the first stage "
        "and the joint phase; false lets it train at every stage",
    ),
    (
        lambda c: grows(c) and not tunes_jointly(c),
        "training.progressive.joint_tuning is off: stacks that grew one by one are never trained together",
    ),
    (
        lambda c: c.training.max_steps is not None and c.training.warmup_steps >= c.training.max_steps,
        "training.warmup_steps is not below training.max_steps: the learning rate never reaches its peak",
    ),
]
"""When, and what to say."""
