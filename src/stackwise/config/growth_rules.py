"""Rules about growth: which stacks there are, how they start, and hand-written stages."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from stackwise.config import attention_rules, model_rules, rules
from stackwise.config.errors import ConfigError, Problem
from stackwise.config.precision_rules import qlora_stacks_have_adapters
from stackwise.config.rules import (
    Check,
    copies_stacks,
    growth_factor,
    program_of,
    rule,
    stacks_at_the_end,
)

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

BLOCK_RULES: tuple[Check, ...] = (
    rules.heads_divide_the_width,
    rules.head_width_is_even_under_rope,
    rules.kv_heads_divide_the_heads,
    rules.frozen_up_projection_has_a_gate,
    rules.clm_needs_causal_attention,
    rules.short_conv_has_a_width,
    model_rules.scaled_positions_are_rotary,
    model_rules.rope_scaling_fits,
    model_rules.full_block_is_one_of_them,
    model_rules.parallel_layers_have_one_norm,
    model_rules.first_norm_is_one_that_can_go,
    attention_rules.rotary_part_of_a_latent_fits_the_positions,
    attention_rules.latents_are_normalised_in_place_of_heads,
    attention_rules.linear_mode_has_positive_features,
    attention_rules.linear_mode_has_no_single_scores,
    attention_rules.score_width_is_of_plain_scores,
)
"""What holds for the model's blocks and for those of every unlike stack."""


@rule(
    "training.progressive.target_stacks",
    "training.progressive.max_stacks",
    "model.architecture.n_stacks",
    "training.progressive.enabled",
)
def stacks_fit_the_limit(config: StackWiseConfig) -> Problem | None:
    progressive = config.training.progressive
    stacks = stacks_at_the_end(config)
    if not progressive.enabled or stacks <= progressive.max_stacks:
        return None
    own = progressive.target_stacks is not None
    return Problem(
        "training.progressive.target_stacks" if own else "model.architecture.n_stacks",
        f"exceeds training.progressive.max_stacks {progressive.max_stacks}",
        stacks,
        f"whole number from 1 to {progressive.max_stacks}",
        "or raise training.progressive.max_stacks",
    )


@rule(
    "training.progressive.stage_weights",
    "training.progressive.target_stacks",
    "model.architecture.n_stacks",
    "training.progressive.enabled",
)
def every_stack_has_a_weight(config: StackWiseConfig) -> Problem | None:
    weights = config.training.progressive.stage_weights
    stacks = stacks_at_the_end(config)
    if weights is None or not config.training.progressive.enabled or len(weights) == stacks:
        return None
    return Problem(
        "training.progressive.stage_weights",
        f"needs one number per stack, {stacks} in all",
        weights,
        f"list of {stacks} of: number > 0",
    )


@rule("training.progressive.new_stack_init", "model.norm_placement", "training.progressive.enabled")
def zero_start_needs_pre_norm(config: StackWiseConfig) -> Problem | None:
    progressive = config.training.progressive
    needed = copies_stacks(config) and progressive.new_stack_init == "zero"
    if not needed or config.model.norm_placement == "pre":
        return None
    return Problem(
        "training.progressive.new_stack_init",
        "zero leaves the logits unchanged only with model.norm_placement pre",
        progressive.new_stack_init,
        "copy, random",
        "or set model.norm_placement to pre",
    )


@rule("model.stacks", "model.architecture.n_stacks", "training.progressive.target_stacks")
def every_stack_has_a_shape(config: StackWiseConfig) -> Problem | None:
    shapes, stacks = config.model.stacks, stacks_at_the_end(config)
    if shapes is None or len(shapes) == stacks:
        return None
    hint = "set model.architecture.n_stacks or training.progressive.target_stacks to their number, or list them all"
    return Problem(
        "model.stacks", f"describes {len(shapes)} stacks, but the run ends with {stacks}", hint=hint
    )


@rule("model.stacks", "model", "training.progressive.training_objective")
def unlike_blocks_can_be_built(config: StackWiseConfig) -> list[Problem]:
    found = []
    for i, shape in enumerate(config.model.stacks or ()):
        seen = config.model_copy(update={"model": shape.applied_to(config.model)})
        for check in BLOCK_RULES:
            problem = check(seen)
            if isinstance(problem, Problem) and not check(config):
                key = f"model.stacks.{i}.{problem.key.removeprefix('model.')}"
                found.append(Problem(key, problem.message, problem.value, problem.allowed, problem.hint))
    return found


@rule(
    "model.stacks",
    "training.progressive.new_stack_init",
    "training.progressive.building_mode",
    "training.unit",
)
def copies_have_the_shape_of_their_source(config: StackWiseConfig) -> Problem | None:
    shapes, progressive = config.model.stacks, config.training.progressive
    stacks = stacks_at_the_end(config)
    if shapes is None or len(shapes) != stacks or not copies_stacks(config):
        return None
    if progressive.building_mode != "grow":
        kinds = [shape.model_copy(update={"n_blocks": None, "dropout": None}) for shape in shapes]
        if progressive.new_stack_init == "random" or all(a == b for a, b in pairwise(kinds)):
            return None
        return Problem(
            "training.progressive.new_stack_init",
            "copies the blocks of the neighbouring stack, but model.stacks gives it other ones",
            progressive.new_stack_init,
            "random",
        )
    factor = growth_factor(config)
    if factor is None or stacks % factor:
        return None
    if all(shapes[i] == shapes[j] for i, j in enumerate(origins(config))):
        return None
    hint = "repeat the shapes in model.stacks as growth repeats the stacks"
    return Problem("model.stacks", "gives a copied stack another shape than its source has", hint=hint)


def origins(config: StackWiseConfig) -> list[int]:
    """For grow: the stack of the small rack that every stack of the full one is made after."""
    stacks, small = stacks_at_the_end(config), stacks_at_the_end(config) // (growth_factor(config) or 1)
    listed = list(range(small))
    if config.training.progressive.growth_pattern == "whole":
        return [i % small for i in range(stacks)]
    middle = config.training.progressive.growth_pattern == "middle"
    while len(listed) < stacks:
        position = (len(listed) - 1) // 2 if middle else len(listed) - 1
        listed.insert(position, listed[position])
    return listed


@rule(
    "training.progressive.growth_factor",
    "model.architecture.n_stacks",
    "training.progressive.target_stacks",
    "training.progressive.building_mode",
    "training.unit",
)
def growth_factor_divides_the_stacks(config: StackWiseConfig) -> Problem | None:
    stacks, factor = stacks_at_the_end(config), growth_factor(config)
    if program_of(config) != "grow" or (factor is not None and stacks % factor == 0):
        return None
    fitting = ", ".join(str(g) for g in (2, 3, 4) if stacks % g == 0)
    hint = (
        ""
        if fitting
        else "end with a number of stacks that 2, 3 or 4 divides, or choose another building_mode"
    )
    message = f"must divide the {stacks} stacks that the run ends with"
    return Problem("training.progressive.growth_factor", message, factor, fitting, hint)


@rule(
    "training.progressive.growth_layers",
    "training.progressive.growth_factor",
    "training.progressive.building_mode",
    "model.architecture",
    "model.stacks",
)
def growth_layers_map_the_full_rack(config: StackWiseConfig) -> Problem | None:
    layers, factor = config.training.progressive.growth_layers, growth_factor(config)
    if layers is None or program_of(config) != "grow" or factor is None:
        return None
    key, per_stack = "training.progressive.growth_layers", config.model.architecture.blocks_per_stack
    if config.model.stacks is not None:
        return Problem(key, "needs stacks of one shape", layers, hint="remove model.stacks")
    blocks, small = stacks_at_the_end(config) * per_stack, stacks_at_the_end(config) // factor * per_stack
    if len(layers) != blocks:
        return Problem(
            key, f"must name a source for each of the {blocks} blocks, not for {len(layers)}", layers
        )
    if wrong := sorted({i for i in layers if i >= small}):
        text = ", ".join(map(str, wrong))
        return Problem(
            key, f"names blocks that the small rack does not have: {text}", layers, f"0 to {small - 1}"
        )
    return None


@rule(
    "training.progressive.train_stacks",
    "checkpoint.init_from",
    "training.progressive.building_mode",
    "model.architecture.n_stacks",
    "training.progressive.target_stacks",
)
def trained_positions_are_there(config: StackWiseConfig) -> Problem | None:
    chosen, last = config.training.progressive.train_stacks, stacks_at_the_end(config) - 1
    if chosen is None or config.training.progressive.building_mode != "independent":
        return None
    key = "training.progressive.train_stacks"
    if any(position > last for position in chosen):
        return Problem(key, "names positions that are not there", chosen, f"0 to {last}")
    if len(set(chosen)) != len(chosen):
        return Problem(key, "names a position twice", chosen)
    begun = config.training.progressive.shared_start_fraction > 0
    if last in chosen and chosen[0] != last and not begun:
        hint = f"put {last} first"
        message = f"trains stack {last}, and with it embedding and head, after stacks that need them"
        return Problem(key, message, chosen, hint=hint)
    if last not in chosen and config.checkpoint.init_from is None:
        message = f"leaves out stack {last}, which trains embedding and head for all"
        hint = f"put {last} first, or set checkpoint.init_from to the run that has trained it"
        return Problem(key, message, chosen, hint=hint)
    return None


@rule(
    "training.progressive.train_embedding",
    "training.progressive.train_head",
    "training.progressive.building_mode",
    "training.progressive.enabled",
)
def independent_stacks_share_what_is_around_them(config: StackWiseConfig) -> list[Problem]:
    if program_of(config) != "independent":
        return []
    return [
        Problem(
            f"training.progressive.{name}",
            "would change under stacks that were trained before, which share it",
            "always",
            "auto, first, never",
        )
        for name in ("train_embedding", "train_head")
        if getattr(config.training.progressive, name) == "always"
    ]


@rule(
    "training.progressive.independent_io",
    "training.progressive.joint_tuning",
    "training.progressive.building_mode",
)
def a_joint_phase_has_one_embedding(config: StackWiseConfig) -> Problem | None:
    progressive = config.training.progressive
    joint = program_of(config) == "independent" and progressive.joint_tuning is True
    if not joint or progressive.independent_io != "own":
        return None
    message = "is of no use to a joint phase, in which all stacks run between one embedding and one head"
    hint = "or set training.progressive.joint_tuning to false"
    return Problem("training.progressive.independent_io", message, "own", "auto, shared", hint)


@rule(
    "training.progressive.shared_start_fraction",
    "training.progressive.train_stacks",
    "checkpoint.init_from",
    "model.stacks",
    "training.progressive.building_mode",
)
def a_shared_start_is_shared(config: StackWiseConfig) -> Problem | None:
    progressive, shapes = config.training.progressive, config.model.stacks
    key, given = "training.progressive.shared_start_fraction", progressive.shared_start_fraction
    if program_of(config) != "independent" or not given:
        return None
    if shapes is not None and any(a != b for a, b in pairwise(shapes)):
        return Problem(key, "copies one stack into all, but model.stacks makes them unlike", given, "0")
    if progressive.train_stacks is not None and config.checkpoint.init_from is None:
        message = "is not trained where training.progressive.train_stacks trains single stacks"
        hint = "train one stack first, and set checkpoint.init_from to that run for all of them"
        return Problem(key, message, given, "0", hint)
    return None


@rule(
    "training.progressive.joint_tuning_backbone",
    "training.progressive.trunk_strategy",
    "training.progressive.qlora_enabled",
)
def adapters_that_train_are_there(config: StackWiseConfig) -> list[Problem]:
    progressive = config.training.progressive
    if progressive.qlora_enabled or program_of(config) == "by_hand":
        return []
    return [
        Problem(
            f"training.progressive.{name}",
            "trains adapters, but training.progressive.qlora_enabled is false",
            "qlora",
            hint="set training.progressive.qlora_enabled to true",
        )
        for name in ("joint_tuning_backbone", "trunk_strategy")
        if getattr(progressive, name) == "qlora"
    ]


@rule("training.stages", "model.max_seq_len")
def stages_are_whole(config: StackWiseConfig) -> list[Problem]:
    found = []
    for i, stage in enumerate(config.training.stages or ()):
        key = f"training.stages.{i}"
        budgets = [name for name in ("max_steps", "max_tokens", "epochs") if getattr(stage, name) is not None]
        if len(budgets) != 1:
            message = "needs exactly one budget" + (f", not {' and '.join(budgets)}" if budgets else "")
            found.append(Problem(key, message, hint="give it one of max_steps, max_tokens and epochs"))
        if stage.seq_len is not None and stage.seq_len > config.model.max_seq_len:
            message = f"exceeds model.max_seq_len {config.model.max_seq_len}"
            found.append(Problem(f"{key}.seq_len", message, stage.seq_len))
        if stage.schedule is not None and stage.schedule[0] >= stage.schedule[1]:
            message = "must start before it ends"
            found.append(Problem(f"{key}.schedule", message, stage.schedule, "[start, total]"))
        if stage.grow is not None and stage.grow.op != "duplicate" and stage.grow.layers is not None:
            message = f"is a map for duplicate, not for {stage.grow.op}"
            found.append(Problem(f"{key}.grow.layers", message, stage.grow.layers, hint="remove it"))
    return found


@rule("training.stages", "training.progressive.max_stacks", "model", "training.progressive")
def stages_can_run(config: StackWiseConfig) -> list[Problem]:
    """Selectors that match nothing, growth past the limit or by a wrong map: what a walk through the stages finds."""
    if config.training.stages is None or stages_are_whole(config):
        return []
    shapes = (*BLOCK_RULES, every_stack_has_a_shape, unlike_blocks_can_be_built)
    if any(check(config) for check in (*shapes, qlora_stacks_have_adapters)):
        return []
    from stackwise.curriculum.program import hand_written

    try:
        hand_written(
            config, steps_per_epoch=1
        )  # how many steps an epoch has is not known here, and changes nothing
    except ConfigError as error:
        return error.problems
    return []
