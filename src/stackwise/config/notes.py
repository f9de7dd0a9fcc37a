"""Keys that are set but without effect in the chosen mode, and choices worth a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stackwise.config import (
    adapter_rules,
    attention_rules,
    cache_rules,
    checkpoint_rules,
    embedding_rules,
    generation_rules,
    guard_rules,
    model_rules,
    moe_rules,
    objective_rules,
    precision_rules,
    residency_rules,
    time_rules,
)
from stackwise.config.rules import appends, program_of, stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def notes_of(config: StackWiseConfig) -> list[str]:
    """One sentence each. A key counts as set when it was given and differs from its default."""
    inert = [
        f"{key} has no effect: {why if isinstance(why, str) else why(config)}"
        for key, applies, why in INERT
        if _is_set(config, key) and applies(config)
    ]
    return inert + [text for applies, text in ADVICE if applies(config)]


def grows(config: StackWiseConfig) -> bool:
    """Whether the run puts one stack after the other on or under trained ones."""
    return program_of(config) in ("append", "prepend") and stacks_at_the_end(config) > 1


def tunes_jointly(config: StackWiseConfig) -> bool:
    """Whether the run ends with a joint phase; where only some stacks train, `merge` comes first."""
    progressive = config.training.progressive
    if program_of(config) in ("by_hand", "end_to_end", "as_one"):
        return False
    if program_of(config) == "independent" and progressive.train_stacks is not None:
        return len(progressive.train_stacks) == stacks_at_the_end(config) and progressive.joint_tuning is True
    wanted = progressive.joint_tuning
    return grows(config) and progressive.building_mode == "append" if wanted == "auto" else wanted


def has_own_io(config: StackWiseConfig) -> bool:
    """Whether independent stacks train embedding, norm and head of their own."""
    choice = config.training.progressive.independent_io
    if program_of(config) != "independent" or choice == "shared":
        return False
    return choice == "own" or (objective_rules.time_of(config) == "depth" and not tunes_jointly(config))


def gives_every_stage_noise(config: StackWiseConfig) -> bool:
    """Whether all stages hide shares of tokens of their own, so that none draws them from everywhere."""
    if program_of(config) == "by_hand":
        return all(stage.noise is not None for stage in config.training.stages or ())
    starts_shared = config.training.progressive.shared_start_fraction and config.checkpoint.init_from is None
    shared = program_of(config) == "independent" and starts_shared
    return objective_rules.time_of(config) == "depth" and not shared and not tunes_jointly(config)


def trains_the_trunk(config: StackWiseConfig) -> bool:
    """Whether older stacks train again at a rate of their own."""
    progressive = config.training.progressive
    if stacks_at_the_end(config) == 1:
        return False
    in_joint = progressive.joint_tuning_backbone in ("trainable", "gradual") and progressive.joint_lr is None
    return (grows(config) and progressive.trunk_strategy == "trainable") or (
        tunes_jointly(config) and in_joint
    )


def _is_set(config: StackWiseConfig, key: str) -> bool:
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
        section = getattr(section, part)
    if section is None:
        return False
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return name in section.model_fields_set and getattr(section, name) != default


def _optimizer_is_not(*names: str) -> Callable[[StackWiseConfig], bool]:
    return lambda config: config.training.optimizer.optimizer_type not in names


def _program_is_not(*names: str) -> Callable[[StackWiseConfig], bool]:
    return lambda config: program_of(config) not in names


MODES = ("append", "prepend", "grow", "independent", "cyclic")
KEYS_OF_MODES: dict[str, tuple[str, ...]] = {
    "training.unit": ("append", "prepend", "independent", "cyclic", "as_one"),
    "training.max_steps": (*MODES, "end_to_end", "as_one"),
    "training.epochs_per_stack": (*MODES, "end_to_end", "as_one"),
    "training.warmup_steps": (*MODES, "end_to_end", "as_one"),
    "training.progressive.building_mode": (*MODES, "by_hand"),
    "training.progressive.max_stacks": (*MODES, "as_one", "by_hand"),
    "training.progressive.target_stacks": (*MODES, "as_one", "by_hand"),
    "training.progressive.trunk_strategy": ("append", "prepend", "end_to_end"),
    "training.progressive.new_stack_init": ("append", "prepend", "grow"),
    "training.progressive.consistency_weight": ("prepend", "by_hand"),
    "training.progressive.global_head_blocks": (*MODES, "as_one", "by_hand"),
    "training.progressive.train_head": (*MODES, "end_to_end", "as_one"),
    "training.progressive.train_embedding": (*MODES, "end_to_end", "as_one"),
    "training.progressive.joint_tuning": MODES,
    "training.progressive.growth_factor": ("grow",),
    "training.progressive.growth_at": ("grow",),
    "training.progressive.growth_pattern": ("grow",),
    "training.progressive.growth_schedule": ("grow",),
    "training.progressive.growth_layers": ("grow",),
    "training.progressive.growth_optimizer": ("append", "prepend", "grow", "cyclic"),
    "training.progressive.rewarmup_fraction": MODES,
    "training.progressive.cycle_sweeps": ("cyclic",),
    "training.progressive.cycle_steps": ("cyclic",),
    "training.progressive.cycle_order": ("cyclic",),
    "training.progressive.train_stacks": ("independent", "by_hand"),
    "training.progressive.independent_io": ("independent",),
    "training.progressive.shared_start_fraction": ("independent",),
    "training.progressive.stage_weights": ("append", "prepend", "independent"),
}
"""Key -> the programs (`rules.program_of`) in which it has an effect."""

JOINT_KEYS = ("joint_tuning_fraction", "joint_tuning_backbone", "joint_lr")


def _why_not(config: StackWiseConfig) -> str:
    training = config.training
    return {
        "by_hand": "training.stages says what happens",
        "end_to_end": "training.progressive.enabled is false",
        "as_one": "training.unit is rack",
    }.get(program_of(config), f"training.progressive.building_mode is {training.progressive.building_mode}")


Reason = str | Callable[["StackWiseConfig"], str]

INERT: list[tuple[str, Callable[[StackWiseConfig], bool], Reason]] = [
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
    (
        "training.new_stack_lr",
        lambda c: not grows(c) and program_of(c) != "independent",
        "no stack is added to a trained one",
    ),
    ("training.trunk_lr", lambda c: not trains_the_trunk(c), "older stacks never train again"),
    ("training.optimizer.adam_lr", _optimizer_is_not("Muon"), "the optimizer is not Muon"),
    ("training.optimizer.momentum", _optimizer_is_not("SGD", "Muon"), "only SGD and Muon read it"),
    (
        "training.optimizer.betas",
        _optimizer_is_not("AdamW", "Adam", "Muon"),
        "only AdamW, Adam and Muon read it",
    ),
    (
        "training.optimizer.eps",
        _optimizer_is_not("AdamW", "Adam", "Muon"),
        "only AdamW, Adam and Muon read it",
    ),
    *((key, _program_is_not(*modes), _why_not) for key, modes in KEYS_OF_MODES.items()),
    (
        "training.progressive.consistency_weight",
        lambda c: program_of(c) == "prepend" and c.training.progressive.trunk_strategy != "frozen",
        "the stacks behind a new one train as well (training.progressive.trunk_strategy)",
    ),
    *(
        (f"training.progressive.{name}", lambda c: not tunes_jointly(c), "there is no joint phase")
        for name in JOINT_KEYS
    ),
    (
        "training.progressive.new_stack_init",
        lambda c: program_of(c) in ("append", "prepend") and stacks_at_the_end(c) == 1,
        "no stack is added to a trained one",
    ),
    (
        "training.progressive.global_head_blocks",
        lambda c: c.training.progressive.enabled and not appends(c),
        "only the rack of an append run has such blocks",
    ),
    (
        "training.progressive.growth_pattern",
        lambda c: program_of(c) == "grow" and c.training.progressive.growth_layers is not None,
        "training.progressive.growth_layers wins",
    ),
    (
        "training.max_steps",
        lambda c: program_of(c) == "cyclic" and c.training.progressive.cycle_steps is not None,
        "training.progressive.cycle_steps wins",
    ),
    *(
        (
            f"objective.{name}",
            lambda c: (
                objective_rules.diffuses(c) and c.objective.weight == "clipped" and gives_every_stage_noise(c)
            ),
            "every stage draws from the noise of its own",
        )
        for name in ("weight", "clip")
    ),
    *model_rules.INERT,
    *moe_rules.INERT,
    *adapter_rules.INERT,
    *attention_rules.INERT,
    *precision_rules.INERT,
    *residency_rules.INERT,
    *cache_rules.INERT,
    *checkpoint_rules.INERT,
    *objective_rules.INERT,
    *embedding_rules.INERT,
    *time_rules.INERT,
    (
        "training.progressive.progressive_qlora",
        lambda c: c.training.progressive.qlora_enabled and not grows(c) and program_of(c) != "by_hand",
        "no stack is added to a trained one",
    ),
    ("data.eval_fraction", lambda c: c.data.eval_path is not None, "data.eval_path wins"),
    ("data.bucketing", lambda c: c.data.packing, "packed rows are all as long"),
    ("data.doc_mask", lambda c: not c.data.packing, "without packing a row holds one document"),
    ("data.text_key", lambda c: c.data.source in ("stdlib", "text"), "the source has no fields"),
    *guard_rules.INERT,
    *generation_rules.INERT,
    (
        "tracking.project",
        lambda c: not {"trackio", "wandb"} & set(c.tracking.sinks),
        "tracking.sinks names neither trackio nor wandb",
    ),
]
"""Key, when it has no effect, and why."""

ADVICE: list[tuple[Callable[[StackWiseConfig], bool], str]] = [
    *adapter_rules.ADVICE,
    *attention_rules.ADVICE,
    *objective_rules.ADVICE,
    *time_rules.ADVICE,
    (
        lambda c: grows(c) and appends(c) and c.model.tie_embeddings is True,
        "model.tie_embeddings: the tied head counts as embedding and stays fixed between the first stage "
        "and the joint phase; false lets it train at every stage",
    ),
    (
        lambda c: grows(c) and appends(c) and not tunes_jointly(c),
        "training.progressive.joint_tuning is off: stacks that grew one by one are never trained together",
    ),
    (
        lambda c: (
            program_of(c) != "by_hand"
            and c.training.max_steps is not None
            and c.training.warmup_steps >= c.training.max_steps
        ),
        "training.warmup_steps is not below training.max_steps: the learning rate never reaches its peak",
    ),
    (
        lambda c: (
            program_of(c) == "grow"
            and c.training.progressive.growth_pattern == "whole"
            and not 0.1 <= c.training.progressive.growth_at <= 0.2
        ),
        "training.progressive.growth_at lies outside 0.10 to 0.20, where growth has paid most (Du et al. 2024, "
        "arXiv 2405.15319)",
    ),
    (
        lambda c: program_of(c) == "independent" and c.model.architecture.blocks_per_stack < 3,
        "training.progressive.building_mode independent with fewer than 3 blocks per stack: each stack is a model of "
        "its own, and one that shallow learns little (arXiv 2506.14202)",
    ),
    (
        lambda c: program_of(c) == "independent" and stacks_at_the_end(c) > 4,
        "training.progressive.building_mode independent with more than 4 stacks: quality falls beyond 3 to 4 "
        "(arXiv 2506.14202)",
    ),
    (
        lambda c: (
            program_of(c) == "independent"
            and c.training.progressive.training_objective == "clm"
            and c.training.progressive.joint_tuning is not True
        ),
        "training.progressive.building_mode independent under clm: every stack learns the whole task by itself, and "
        "run one behind the other they have to be tuned together (training.progressive.joint_tuning)",
    ),
]
"""When, and what to say."""
