"""What a changed key means to a run that is resumed. Every key has one of three classes, and this is the place for it.

identity   what is trained, and on what: another value is another run
schedule   how it is trained from here on: may change where the user allows it (`--allow-change`)
free       where, how visibly and how safely it is trained: may change
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["identity", "schedule", "free"]

SECTIONS: dict[str, Kind] = {
    "base": "free",  # a file's parents; what they say stands in the keys
    "model": "identity",
    "objective": "identity",
    "data": "identity",
    "evaluation": "free",
    "generation": "free",
    "tracking": "free",
    "checkpoint": "free",
    "training.stages.N": "identity",
}
"""Of all keys in a section, but for those below."""

_KEYS: dict[Kind, dict[str, str]] = {
    "identity": {
        "training": "unit stages seed seq_len dtype",
        "training.optimizer": "optimizer_type custom_params memory",
        "training.progressive": "enabled building_mode max_stacks target_stacks training_objective trunk_strategy "
        "new_stack_init train_head train_embedding global_head_blocks joint_tuning joint_tuning_backbone "
        "growth_factor growth_pattern growth_schedule growth_layers growth_optimizer cycle_sweeps cycle_order "
        "train_stacks independent_io shared_start_fraction trunk_precision new_stack_precision fake_quant "
        "qlora_enabled qlora_rank qlora_alpha qlora_dropout qlora_method qlora_target_modules qlora_use_rslora "
        "qlora_strategy qlora_rank_pattern qlora_alpha_pattern qlora_configs progressive_qlora progressive_qlora_rank "
        "progressive_qlora_alpha trunk_lora_mode cache_activations cache_dtype time_interpretation time_per_stack "
        "num_time_steps stack_time_mapping time_boundaries time_overlap time_step_mask_fractions time_embedding_dim "
        "time_encoding_type time_sampling time_conditioning",
        "checkpoint": "init_from",
    },
    "schedule": {
        "training": "batch_size gradient_accumulation_steps max_steps epochs_per_stack deterministic "
        "max_grad_norm on_nonfinite spike_policy spike_sigma spike_window rollback_steps lr_schedule warmup_steps "
        "decay_fraction min_lr_ratio new_stack_lr trunk_lr loss_chunk_tokens",
        "training.optimizer": "lr adam_lr weight_decay betas eps momentum groups",
        "training.stages.N": "max_steps max_tokens epochs lr trunk_lr io_lr adapter_lr warmup_steps schedule "
        "data_start batch_size",
        "training.progressive": "consistency_weight joint_tuning_fraction joint_lr growth_at rewarmup_fraction "
        "cycle_steps stage_weights qlora_lr",
    },
    "free": {
        "training": "run_id device recheck gradient_checkpointing residency compile",
        "training.optimizer": "state_device",
        "training.stages.N": "name",
        "training.progressive": "trunk_residency cache_dir cache_max_bytes cache_ram_bytes",
        "data": "num_workers cache_dir",
    },
}

CLASSES: dict[str, Kind] = {
    f"{section}.{name}": kind
    for kind, sections in _KEYS.items()
    for section, names in sections.items()
    for name in names.split()
}
"""Key -> class, for keys whose section does not settle it."""


def class_of(key: str) -> Kind:
    """The class of a dotted key; positions in lists are `N` or a number. A key without one is a KeyError."""
    parts = ["N" if part.isdecimal() else part for part in key.split(".")]
    named = ".".join(parts)
    if named in CLASSES:
        return CLASSES[named]
    for length in range(len(parts), 0, -1):
        section = ".".join(parts[:length])
        if section in CLASSES:  # inside a free map or a list that is one value
            return CLASSES[section]
        if section in SECTIONS:
            return SECTIONS[section]
    raise KeyError(f"{key} has no class; add it to stackwise.config.resume_classes")
