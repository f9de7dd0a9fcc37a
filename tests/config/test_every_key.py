"""Every config key changes something: a table of proofs, one per key of the schema.

A proof is a function of the key that fails when the key has no effect. A key that another test proves
stands in PROVEN_ELSEWHERE with that test. Whoever adds a key adds its row here.
"""

import ast
import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise import ConfigError, StackWiseConfig
from stackwise.adapters.ranks import set_of
from stackwise.config.resolve import resolve
from stackwise.config.schema import schema_rows
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.model.attention_settings import ATTENTION_TYPES
from stackwise.model.describe import rack_spec
from stackwise.model.own_io import Head
from stackwise.model.spec import AdapterSpec, RackSpec
from stackwise.objectives.build import objective_of

ROOT = Path(__file__).parents[2]

Proof = Callable[[str], None]


def config_with(values: dict[str, Any]) -> StackWiseConfig:
    """The defaults with dotted keys set; only the shape is checked, so that one key can be changed alone."""
    data: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = data
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = copy.deepcopy(value)  # a map may be changed by a key inside it
    return StackWiseConfig(**data)


def changes(what: Callable[[StackWiseConfig], Any], to: Any, given: dict[str, Any] | None = None) -> Proof:
    """Proof that `what` of a configuration is another once the key is `to`."""

    def proof(key: str) -> None:
        before = given or {}
        assert what(config_with(before)) != what(config_with({**before, key: to}))

    return proof


def refused(value: Any, message: str, given: dict[str, Any] | None = None) -> Proof:
    """Proof that a configuration with the value breaks a rule, and without it breaks none."""

    def proof(key: str) -> None:
        config_with(given or {}).validate()
        with pytest.raises(ConfigError, match=message):
            config_with({**(given or {}), key: value}).validate()

    return proof


def rack(to: Any, given: dict[str, Any] | None = None) -> Proof:
    """Proof that the description from which the rack is built is another one."""
    return changes(rack_spec, to, {"model.vocab_size": 97, **(given or {})})


def course(to: Any, given: dict[str, Any] | None = None) -> Proof:
    """Proof that the stages of the run are others: what grows, what trains, at which rate, for how long."""
    return changes(lambda config: stages(config, steps_per_epoch=100), to, given)


def own_attention(proof: Proof) -> Proof:
    """The proof with a second kind of attention registered."""

    def registered(key: str) -> None:
        ATTENTION_TYPES.append("own")
        try:
            proof(key)
        finally:
            ATTENTION_TYPES.remove("own")

    return registered


def sets(to: Any, given: dict[str, Any] | None = None) -> Proof:
    """Proof that the adapter sets of some stack are others."""

    def described(config: StackWiseConfig) -> list[AdapterSpec]:
        return [set_of(config.training.progressive, name, b) for name in ("stack", "trunk") for b in range(3)]

    return changes(described, to, given)


def described(config: StackWiseConfig) -> list[RackSpec]:
    """The rack of every stage."""
    run = stages(config, steps_per_epoch=100)
    return stage_specs(config, run, first_spec(config, run), "fp32")


def stacks(to: Any, given: dict[str, Any] | None = None) -> Proof:
    """Proof that in some stage the stacks of the rack are others: their storage or their adapter sets."""

    return changes(described, to, {"model.vocab_size": 97, **STEPS, **(given or {})})


def item(
    what: Callable[[StackWiseConfig], Any], to: Any, before: list[dict[str, Any]], **given: Any
) -> Proof:
    """Proof that `what` changes with a key of the last item of a list, which is `before` without it."""

    def proof(key: str) -> None:
        name, _, inside = key.partition(".N.")
        after = copy.deepcopy(before)
        *sections, leaf = inside.split(".")
        level = after[-1]
        for section in sections:
            level = level.setdefault(section, {})
        level[leaf] = to
        others = {key.replace("__", "."): value for key, value in given.items()}
        assert what(config_with({**others, name: before})) != what(config_with({**others, name: after}))

    return proof


def attention_keys(section: str, others: dict[str, Any]) -> dict[str, Proof]:
    """Proofs of the keys of latents and kernels in one section."""
    return {
        f"{section}.{name}": rack(
            to, {**others, **{f"{section}.{key}": value for key, value in given.items()}}
        )
        for name, (to, given) in ATTENTION.items()
    }


def program(config: StackWiseConfig) -> Any:
    return stages(config, steps_per_epoch=100)


def stage(to: Any, **more: Any) -> Proof:
    """Proof that a hand-written stage becomes another one."""
    return item(program, to, [{"train": ["all"], "max_steps": 5, **more}])


def growth(to: Any, **grow: Any) -> Proof:
    """Proof that a hand-written stage grows otherwise."""
    grown = {"train": ["all"], "max_steps": 5, "grow": {"op": "append", **grow}}
    return item(program, to, [{"train": ["all"], "max_steps": 5}, grown])


def shape(to: Any) -> Proof:
    """Proof that a stack described by itself becomes another one."""
    return item(rack_spec, to, [{}, {}], model__vocab_size=97)


def budget(to: int, name: str) -> Proof:
    """Proof that the budget of a stage is another one: it has exactly one of three."""

    def proof(key: str) -> None:
        listed = [
            program(config_with({"training.stages": [{"train": ["all"], name: value}]}))
            for value in (to, 999)
        ]
        assert listed[0] != listed[1]

    return proof


def learned(config: StackWiseConfig) -> list[float]:
    """The losses of four visits of the same samples, as the training loop takes them, of a head on fixed states."""
    config, _ = resolve(config, vocab_size=20)
    objective = objective_of(config)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 20, (6, 16), generator=generator)
    hidden, matrix = torch.randn(6, 16, 8, generator=generator), torch.randn(21, 8, generator=generator)
    rows, losses = torch.arange(6), []
    for draw in range(4):
        draws = torch.full_like(rows, draw)
        batch = {"input_ids": ids, "sample_ids": rows, "places": rows, "draws": draws, "targets": ids}
        example = objective.corrupt(batch)
        seen = hidden * (1 + (example.input_ids == ids))[:, :, None]  # what is hidden changes the states
        loss, weight = objective.loss(objective.embedded(seen, example), Head.of(matrix), example)
        losses.append(float(loss / weight))
    return losses


def lessons(to: Any, given: dict[str, Any]) -> Proof:
    """Proof that the losses are others."""
    return changes(learned, to, given)


def mask_token(config: StackWiseConfig) -> tuple[int | None, int | None]:
    resolved, _ = resolve(config, vocab_size=20, mask_id=None)
    return resolved.objective.mask_token_id, resolved.model.vocab_size


def no_mask_token(key: str) -> None:
    """Proof that a tokenizer without a mask token is refused where none may be added."""
    mask_token(config_with(MASKED))
    with pytest.raises(ConfigError, match="has no mask token"):
        mask_token(config_with({**MASKED, key: False}))


def own_loss(key: str) -> None:
    """Proof that the losses are those of the function that the key names."""
    module = types.ModuleType("losses_of_a_test")
    module.zero_one = lambda logits, targets: (logits.argmax(-1) != targets).float()  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        custom = {"training.progressive.training_objective": "custom", "model.vocab_size": 21}
        lessons(f"{module.__name__}:zero_one", custom)(key)
    finally:
        del sys.modules[module.__name__]


MOE = {"model.moe.n_experts": 4}
CUSTOM = {"model.attention_preset": "custom"}
MLA = {"attention_type": "mla"}
KERNEL = {"kernel_type": "laplacian"}
ATTENTION: dict[str, tuple[Any, dict[str, Any]]] = {
    "mla_rq": (0, MLA),
    "mla_rkv": (7, MLA),
    "mla_rope_dim": (6, MLA),
    "kernel_type": ("uniform", {}),
    "kernel_dim": (8, KERNEL),
    "kernel_mode": ("exact", KERNEL),
    "kernel_bandwidth": (2.0, KERNEL),
    "kernel_norm": ("l1", KERNEL),
}
"""Keys of latents and kernels: a value, and the keys beside which it has an effect."""
GROW = {"training.progressive.building_mode": "grow", "training.max_steps": 100}
CYCLIC = {"training.progressive.building_mode": "cyclic", "training.max_steps": 100}
ALONE = {"training.progressive.building_mode": "independent", "training.max_steps": 100}
STEPS = {"training.max_steps": 100}
MASKED = {"training.progressive.training_objective": "mlm"}
DIFFUSION = {"training.progressive.training_objective": "diffusion"}
BY_TIME = {**DIFFUSION, "objective.form": "t"}
DEPTH = {**DIFFUSION, **ALONE, "model.architecture.n_stacks": 3}
POINTS = {**DEPTH, "training.progressive.time_step_mask_fractions": "schedule"}
OWN = {**DEPTH, "training.progressive.stack_time_mapping": "custom"}
TOLD = {**MASKED, "training.progressive.time_interpretation": "input"}
TABLE = {**TOLD, "training.progressive.time_encoding_type": "learned"}
YARN = {"type": "yarn", "factor": 4.0}
LONG = {"type": "longrope", "factor": 4.0, "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
ALONG = {"training.progressive.qlora_strategy": "progressive"}

PROOFS: dict[str, Proof] = {
    "model.d_model": rack(96),
    "model.n_heads": rack(6),
    "model.n_kv_heads": rack(3),
    "model.head_dim": rack(32),
    "model.attention_bias": rack("qkv"),
    "model.attention_softcap": rack(30.0),
    "model.score_width": rack(9.0),
    "model.sliding_window": rack(64),
    "model.window_every": rack(2, {"model.sliding_window": 64}),
    "model.full_block": rack(0, {"model.sliding_window": 64, "model.window_every": 2}),
    "model.attention_sinks": rack(4, {"model.sliding_window": 64}),
    "model.local_rope_theta": rack(1e3, {"model.sliding_window": 64}),
    "model.parallel_layers": rack(True),
    "model.first_norm": rack(False),
    "model.rope_scaling.type": rack("linear", {"model.rope_scaling": YARN}),
    "model.rope_scaling.factor": rack(2.0, {"model.rope_scaling": YARN}),
    "model.rope_scaling.original_max_seq_len": rack(300, {"model.rope_scaling": YARN}),
    "model.rope_scaling.attention_factor": rack(1.5, {"model.rope_scaling": YARN}),
    "model.rope_scaling.beta_fast": rack(16.0, {"model.rope_scaling": YARN}),
    "model.rope_scaling.beta_slow": rack(2.0, {"model.rope_scaling": YARN}),
    "model.rope_scaling.mscale": rack(
        0.7, {"model.rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
    ),
    "model.rope_scaling.mscale_all_dim": rack(
        0.7, {"model.rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
    ),
    "model.rope_scaling.truncate": rack(False, {"model.rope_scaling": YARN}),
    "model.rope_scaling.low_freq_factor": rack(2.0, {"model.rope_scaling": {**YARN, "type": "llama3"}}),
    "model.rope_scaling.high_freq_factor": rack(8.0, {"model.rope_scaling": {**YARN, "type": "llama3"}}),
    "model.rope_scaling.short_factor": rack([2.0] * 32, {"model.rope_scaling": LONG}),
    "model.rope_scaling.long_factor": rack([2.0] * 32, {"model.rope_scaling": LONG}),
    "model.d_ff": rack(100),
    "model.vocab_size": rack(98),
    "model.max_seq_len": rack(512),
    "model.architecture.n_stacks": rack(3),
    "model.architecture.blocks_per_stack": rack(3),
    "model.attention_preset": rack("bert_style"),
    "model.attention_custom.attention_type": own_attention(rack("own", CUSTOM)),
    "model.attention_custom.attention_mode": rack("causal", CUSTOM),
    "model.attention_custom.qk_norm": rack(True, CUSTOM),
    "model.attention_overrides.attention_type": own_attention(rack("own")),
    "model.attention_overrides.attention_mode": rack("bidirectional"),
    "model.attention_overrides.qk_norm": rack(True),
    **attention_keys("model.attention_custom", CUSTOM),
    **attention_keys("model.attention_overrides", {}),
    "model.qk_norm": rack(True),
    "model.norm": rack("layernorm"),
    "model.norm_placement": rack("post"),
    "model.norm_eps": rack(1e-6),
    "model.ffn_type": rack("geglu"),
    "model.bias": rack(True),
    "model.moe.n_experts": rack(4),
    "model.moe.top_k": rack(3, MOE),
    "model.moe.n_shared": rack(1, MOE),
    "model.moe.d_ff": rack(32, MOE),
    "model.moe.router": rack("sigmoid", MOE),
    "model.moe.normalise": rack(False, MOE),
    "model.moe.scale": rack(2.5, MOE),
    "model.moe.groups": rack(2, MOE),
    "model.moe.top_groups": rack(2, {**MOE, "model.moe.groups": 4, "model.moe.top_k": 1}),
    "model.moe.balancing": rack("bias", MOE),
    "model.moe.aux_weight": rack(0.1, MOE),
    "model.moe.bias_rate": rack(0.1, MOE),
    "model.moe.z_weight": rack(0.1, MOE),
    "model.moe.every": rack(2, MOE),
    "model.moe.first_dense": rack(1, MOE),
    "model.freeze_up_proj": rack(True),
    "model.dropout": rack(0.1),
    "model.pos_encoding": rack("sinusoidal"),
    "model.use_rope": rack(False),
    "model.rope_theta": rack(500.0),
    "model.embedding_norm": rack(True),
    "model.embedding_scale": rack(2.0),
    "model.token_types": rack(2),
    "model.embedding_width": rack(32),
    "model.tokenizer_embedding.adapter_hidden_dim": rack(8),
    "model.tie_adapter": rack("transpose", {"model.embedding_width": 32, "model.tie_embeddings": True}),
    "model.head_rank": rack(8),
    "model.head_transform": rack(True),
    "model.head_bias": rack(True),
    "model.logit_softcap": rack(30.0),
    "model.final_norm": rack(False),
    "model.tie_embeddings": rack(True),
    "model.residual_gain": rack(0.5),
    "model.spectral_norm": rack(True),
    "model.short_conv": rack(3),
    "model.zero_init_outputs": rack(True),
    "model.stacks.N.n_blocks": shape(7),
    "model.stacks.N.n_heads": shape(6),
    "model.stacks.N.n_kv_heads": shape(3),
    "model.stacks.N.d_ff": shape(100),
    "model.stacks.N.ffn_type": shape("geglu"),
    "model.stacks.N.attention_preset": shape("bert_style"),
    "model.stacks.N.attention_overrides.attention_type": own_attention(
        item(rack_spec, "own", [{}, {}], model__vocab_size=97)
    ),
    "model.stacks.N.attention_overrides.attention_mode": shape("bidirectional"),
    "model.stacks.N.attention_overrides.qk_norm": shape(True),
    **{
        f"model.stacks.N.attention_overrides.{name}": item(
            rack_spec, to, [{}, {"attention_overrides": given}], model__vocab_size=97
        )
        for name, (to, given) in ATTENTION.items()
    },
    "model.stacks.N.dropout": shape(0.1),
    "model.stacks.N.windowed": item(
        rack_spec, False, [{}, {}], model__vocab_size=97, model__sliding_window=4
    ),
    "model.stacks.N.experts": item(rack_spec, False, [{}, {}], model__vocab_size=97, model__moe__n_experts=4),
    "model.stacks": rack([{}, {"d_ff": 96}]),
    "objective.mask_fraction": lessons(0.5, MASKED),
    "objective.corruption": lessons("absorbing", MASKED),
    "objective.predict": lessons("noise", {**MASKED, "objective.corruption": "gaussian"}),
    "objective.mask_prob": lessons(0.1, MASKED),
    "objective.random_prob": lessons(0.9, {**MASKED, "objective.mask_prob": 0.0}),
    "objective.keep_prob": refused(0.2, "sums to 1.1, not 1"),
    "objective.mask_token_id": changes(mask_token, 3, MASKED),
    "objective.add_mask_token": no_mask_token,
    "objective.noise_schedule": lessons("cosine", BY_TIME),
    "objective.noise_power": lessons(3.0, {**BY_TIME, "objective.noise_schedule": "power"}),
    "objective.noise_table": lessons(
        [0.0, 0.9, 1.0],
        {**BY_TIME, "objective.noise_schedule": "table", "objective.noise_table": [0.0, 0.1, 1.0]},
    ),
    "objective.weight": lessons("uniform", DIFFUSION),
    "objective.clip": lessons([0.0, 0.1], {**DIFFUSION, "objective.weight": "clipped"}),
    "objective.form": lessons("t", DIFFUSION),
    "objective.t_sampling": lessons("uniform", DIFFUSION),
    "objective.t_eps": lessons(0.9, BY_TIME),
    "objective.min_mask_fraction": course(0.3, POINTS),
    "objective.max_mask_fraction": course(0.6, POINTS),
    "objective.mask_schedule_type": course("exponential", POINTS),
    "objective.mask_draws": lessons(1, DIFFUSION),
    "objective.nested_masks": lessons(False, DIFFUSION),
    "objective.random_length_fraction": lessons(1.0, DIFFUSION),
    "objective.target_shift": lessons(True, DIFFUSION),
    "objective.loss_fn": own_loss,
    "objective.z_loss": lessons(0.1, DIFFUSION),
    "training.progressive.training_objective": lessons("diffusion", MASKED),
    "training.progressive.stack_time_mapping": course("exponential", DEPTH),
    "training.progressive.time_boundaries": course(
        [0, 0.1, 0.5, 1], {**OWN, "training.progressive.time_boundaries": [0, 0.2, 0.5, 1]}
    ),
    "training.progressive.time_overlap": course(0.2, DEPTH),
    "training.progressive.time_step_mask_fractions": course([0.1, 0.5, 0.8], DEPTH),
    "training.progressive.time_sampling": lessons(
        "batch", {**DIFFUSION, "training.progressive.time_interpretation": "input"}
    ),
    "training.unit": course("block", STEPS),
    "training.stages": course([{"train": ["all"], "max_steps": 5}], STEPS),
    "training.stages.N.train": stage(["new"]),
    "training.stages.N.name": stage("first"),
    "training.stages.N.n_stacks": stage(1),
    "training.stages.N.max_steps": budget(7, "max_steps"),
    "training.stages.N.max_tokens": budget(70000, "max_tokens"),
    "training.stages.N.epochs": budget(3, "epochs"),
    "training.stages.N.grow.op": growth("prepend"),
    "training.stages.N.grow.n_blocks": growth(3),
    "training.stages.N.grow.init": growth("zero"),
    "training.stages.N.grow.factor": growth(3, op="duplicate"),
    "training.stages.N.grow.layers": growth([0, 1, 2, 3, 3, 2, 1, 0], op="duplicate"),
    "training.stages.N.grow.blocks": growth([{"d_ff": 96}]),
    "training.stages.N.lr": stage(0.5),
    "training.stages.N.trunk_lr": stage(0.5),
    "training.stages.N.io_lr": stage(0.5),
    "training.stages.N.adapter_lr": stage(0.5),
    "training.stages.N.warmup_steps": stage(2),
    "training.stages.N.schedule": stage([2, 50]),
    "training.stages.N.optimizer_state": stage("carry"),
    "training.stages.N.alone": stage(1, train=["stack:1"]),
    "training.stages.N.data_start": stage(3),
    "training.stages.N.noise": stage([0.2, 0.5]),
    "training.stages.N.eval_noise": stage([0.2, 0.5]),
    "training.stages.N.seq_len": stage(8),
    "training.stages.N.batch_size": stage(2),
    "training.stages.N.precision": item(
        described, "nf4", [{"train": ["all"], "max_steps": 5}], model__vocab_size=97
    ),
    "training.max_steps": course(7),
    "training.epochs_per_stack": course(2),
    "training.warmup_steps": course(5, STEPS),
    "training.new_stack_lr": course(0.5, STEPS),
    "training.trunk_lr": course(0.5, STEPS),
    "training.progressive.enabled": course(False, STEPS),
    "training.progressive.max_stacks": refused(1, "exceeds training.progressive.max_stacks 1"),
    "training.progressive.target_stacks": course(3, STEPS),
    "training.progressive.trunk_strategy": course("trainable", STEPS),
    "training.progressive.new_stack_init": course("zero", STEPS),
    "training.progressive.train_head": course("first", STEPS),
    "training.progressive.train_embedding": course("never", STEPS),
    "training.progressive.global_head_blocks": rack(0),
    "training.progressive.time_interpretation": rack("input", MASKED),
    "training.progressive.time_embedding_dim": rack(96, TOLD),
    "training.progressive.time_encoding_type": rack("learned", TOLD),
    "training.progressive.time_conditioning": rack("adaln", TOLD),
    "training.progressive.num_time_steps": rack(50, TABLE),
    "training.progressive.time_per_stack": rack(50, TABLE),
    "training.progressive.joint_tuning": course(False, STEPS),
    "training.progressive.joint_tuning_fraction": course(0.5, STEPS),
    "training.progressive.growth_optimizer": course("carry", STEPS),
    "training.progressive.rewarmup_fraction": course(0.5, STEPS),
    "training.progressive.stage_weights": course([2, 1], STEPS),
    "training.progressive.building_mode": course("cyclic", STEPS),
    "training.progressive.joint_tuning_backbone": course("frozen", STEPS),
    "training.progressive.joint_lr": course(0.5, STEPS),
    "training.progressive.growth_factor": course(2, {**GROW, "model.architecture.n_stacks": 4}),
    "training.progressive.growth_at": course(0.2, GROW),
    "training.progressive.growth_schedule": course("own", GROW),
    "training.progressive.growth_pattern": course("middle", {**GROW, "model.architecture.n_stacks": 4}),
    "training.progressive.growth_layers": course([0, 0, 1, 1, 2, 2, 3, 3], GROW),
    "training.progressive.cycle_sweeps": course(3, CYCLIC),
    "training.progressive.cycle_steps": course(3, CYCLIC),
    "training.progressive.cycle_order": course("backward", CYCLIC),
    "training.progressive.train_stacks": course([1], ALONE),
    "training.progressive.independent_io": course("own", ALONE),
    "training.progressive.shared_start_fraction": course(0.2, ALONE),
    "training.progressive.qlora_enabled": stacks(True),
    "training.progressive.qlora_rank": sets(4),
    "training.progressive.qlora_alpha": sets(4.0),
    "training.progressive.qlora_dropout": sets(0.3),
    "training.progressive.qlora_method": sets("dora"),
    "training.progressive.qlora_target_modules": sets(["q", "v"]),
    "training.progressive.qlora_use_rslora": sets(True),
    "training.progressive.qlora_strategy": sets(
        "progressive", {"training.progressive.qlora_rank_pattern": "increasing"}
    ),
    "training.progressive.qlora_rank_pattern": sets("linear", ALONG),
    "training.progressive.qlora_alpha_pattern": sets("linear", ALONG),
    "training.progressive.qlora_configs": sets(
        {b: {"rank": 3, "alpha": 1.0} for b in range(3)},
        {
            "training.progressive.qlora_strategy": "variable",
            "training.progressive.qlora_configs": {b: {"rank": 4, "alpha": 1.0} for b in range(3)},
        },
    ),
    "training.progressive.progressive_qlora": stacks(True, {"training.progressive.qlora_enabled": True}),
    "training.progressive.progressive_qlora_rank": sets(3),
    "training.progressive.progressive_qlora_alpha": sets(3.0),
}

PROVEN_ELSEWHERE = {
    "tracking.sinks": "tests/tracking/test_sinks.py::test_a_run_hands_its_figures_to_the_trackers_it_names",
    "tracking.project": "tests/tracking/test_sinks.py::test_the_project_is_where_trackers_file_the_run",
    "model.tokenizer_embedding.family": "tests/model/test_pretrained_tables.py::test_the_table_is_that_of_the_folder",
    "model.tokenizer_embedding.embedding_option": "tests/model/test_pretrained_tables.py::test_the_table_is_that_of_the_folder",
    "model.tokenizer_embedding.freeze_embeddings": "tests/model/test_pretrained_tables.py::"
    "test_frozen_tables_stay_and_what_is_around_them_trains",
    "training.progressive.consistency_weight": "tests/training/test_consistency.py::test_runs_hold_new_stacks_to_it_and_no_others",
    "training.stages.N.cache": "tests/curriculum/test_own_keys.py::test_a_stage_decides_about_its_own_store",
    "checkpoint.init_from": "tests/curriculum/test_start.py::"
    "test_init_from_starts_from_the_weights_of_another_run",
    "training.progressive.qlora_lr": "tests/adapters/test_stages.py::test_adapters_train_at_a_rate_of_their_own",
    "training.progressive.trunk_lora_mode": "tests/adapters/test_builder.py::test_in_merge_mode_trunk_sets_are_folded_in_when_the_next_stack_arrives",
    "training.residency": "tests/trunk/streaming/test_streamed_runs.py::test_residency_changes_where_bytes_are_and_no_number",
    "training.progressive.trunk_residency": "tests/trunk/streaming/test_streamed_runs.py::test_residency_changes_where_bytes_are_and_no_number",
    "training.on_nonfinite": "tests/invariants/test_runs.py::test_nonfinite_steps_can_be_skipped_and_are_counted",
    "training.spike_policy": "tests/training/test_guard.py::test_nothing_is_a_spike_before_half_of_the_window_is_there_or_with_the_policy_off",
    "training.spike_sigma": "tests/training/test_guard.py::test_a_spike_is_a_loss_beyond_sigma_deviations_of_the_window",
    "training.spike_window": "tests/training/test_guard.py::test_a_spike_is_a_loss_beyond_sigma_deviations_of_the_window",
    "training.rollback_steps": "tests/training/test_guard.py::test_a_spike_goes_back_so_many_steps_and_skips_what_lies_between",
    "training.recheck": "tests/training/test_guard.py::test_computing_twice_finds_hardware_that_errs",
    "training.gradient_checkpointing": "tests/invariants/test_runs.py::test_gradient_checkpointing_changes_nothing_but_memory",
    "checkpoint.asynchronous": "tests/training/test_keeper.py::test_auto_copies_only_what_is_small_where_the_device_is_the_processor",
    "checkpoint.grace_seconds": "tests/faults/test_signals.py::test_a_save_that_takes_half_of_the_grace_is_warned_of_once",
    "checkpoint.on_save_error": "tests/training/test_keeper.py::test_a_full_disk_stops_the_run_or_is_noted",
    "checkpoint.full_precision_backup": "tests/invariants/test_formats.py::test_without_the_backup_only_the_rounded_weights_are_there",
    "base": "tests/config/test_inheritance.py::test_defaults_then_parents_in_order_then_file_then_overrides",
    "data.source": "tests/data/test_sources.py::test_jsonl_rows_are_documents_and_blank_lines_are_not",
    "data.path": "tests/data/test_sources.py::test_text_files_are_read_byte_for_byte_in_the_order_of_their_names",
    "data.eval_path": "tests/data/test_prepare.py::test_an_eval_path_is_the_whole_validation_split",
    "data.eval_fraction": "tests/data/test_prepare.py::test_the_hash_follows_everything_that_shapes_the_corpus",
    "data.tokenizer": "tests/data/test_prepare.py::test_the_hash_follows_everything_that_shapes_the_corpus",
    "data.text_key": "tests/data/test_sources.py::test_jsonl_rows_are_documents_and_blank_lines_are_not",
    "data.bucketing": "tests/data/test_buckets.py::test_rows_of_a_batch_are_about_as_long",
    "data.max_bytes": "tests/data/test_sources.py::test_max_bytes_ends_the_text_at_the_last_whole_character",
    "generation.sampler": "tests/inference/test_masked_text.py::test_all_settings_of_sampling_are_passed_on",
    "generation.steps": "tests/inference/test_masked_text.py::test_all_settings_of_sampling_are_passed_on",
    "generation.grid": "tests/inference/test_masked_text.py::test_all_settings_of_sampling_are_passed_on",
    "generation.block_length": "tests/inference/test_masked_text.py::test_all_settings_of_sampling_are_passed_on",
    "generation.threshold": "tests/inference/test_masked_text.py::test_all_settings_of_sampling_are_passed_on",
    "training.progressive.cache_activations": "tests/trunk/store/test_decide.py::test_open_prefix_decides_by_the_stage",
    "training.progressive.cache_dir": "tests/trunk/store/test_manager.py::test_the_manager_does_as_the_keys_say",
    "training.progressive.cache_max_bytes": "tests/trunk/store/test_manager.py::test_the_manager_does_as_the_keys_say",
    "training.progressive.cache_ram_bytes": "tests/trunk/store/test_manager.py::test_the_manager_does_as_the_keys_say",
    "training.progressive.cache_dtype": "tests/trunk/store/test_manager.py::test_the_manager_does_as_the_keys_say",
}
"""Key -> the test, `path::name`, that fails when the key has no effect."""

RUNS = ROOT / "tests/training/test_keys.py"


def proven_by_runs() -> set[str]:
    """Keys of the tables COURSE, EVENTS and OTHER of tests/training/test_keys.py."""
    keys: set[str] = set()
    for node in ast.parse(RUNS.read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id in ("COURSE", "EVENTS", "OTHER"):
            items = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            keys |= {item.value for item in items}
    return keys


@pytest.mark.parametrize("key", PROOFS)
def test_a_key_changes_something(key):
    PROOFS[key](key)


@pytest.mark.parametrize("key", PROVEN_ELSEWHERE)
def test_the_test_that_proves_a_key_exists(key):
    path, _, name = PROVEN_ELSEWHERE[key].partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_key_of_the_schema_has_one_proof():
    keys = {row.key for row in schema_rows()}
    rows = [*PROOFS, *PROVEN_ELSEWHERE, *proven_by_runs()]
    assert len(rows) == len(set(rows)), "a key is proven in two places"
    assert set(rows) - keys == set(), "rows of keys that do not exist"
    assert sorted(keys - set(rows)) == [], "keys without a proof"
