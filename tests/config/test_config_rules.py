"""What must hold between keys, which keys have no effect beside others, and the deprecated keys."""

import warnings

import pytest

from stackwise import ConfigError, StackWiseConfig
from stackwise.config.document import parse
from stackwise.config.notes import INERT
from stackwise.config.rules import RULES
from stackwise.config.shape import field_at, walk

BOTH_WAYS = "model: {attention_preset: bert_style}\ntraining: {progressive: {training_objective: diffusion, enabled: false}}"

DEPTH = (
    "model: {attention_preset: bert_style}\n"
    "training: {progressive: {building_mode: independent, training_objective: diffusion, %s}}"
)

MLA = "model: {attention_preset: mla_attention, attention_overrides: {attention_mode: causal, %s}}"

BROKEN = [
    (
        "checkpoint: {save_interval: 100, keep_every: 250}",
        "checkpoint.keep_every",
        "is no multiple of checkpoint.save_interval (100), so most of these steps are never saved, got 250; "
        "allowed: a multiple of it, such as 200",
    ),
    (
        "model: {stacks: [{windowed: false}, {}]}\ntraining: {progressive: {enabled: false}}",
        "model.stacks.0.windowed",
        "leaves out the window, but model.sliding_window is null",
    ),
    (
        "model: {stacks: [{}, {experts: false}]}\ntraining: {progressive: {enabled: false}}",
        "model.stacks.1.experts",
        "leaves out the experts, but model.moe.n_experts is 0",
    ),
    (
        "data: {packing: false, bucketing: true}\ntraining: {progressive: {cache_activations: true}}",
        "training.progressive.cache_activations",
        "stored outputs have one width, and under data.bucketing batches have widths of their own",
    ),
    (
        "model: {d_model: 100}",
        "model.n_heads",
        "must divide model.d_model 100, got 12; allowed: 1, 2, 4, 5, 10, 20, 25, 50, 100; or set model.head_dim",
    ),
    ("model: {d_model: 12, n_heads: 4}", "model.d_model", "even head width"),
    (
        "model: {tie_embeddings: true, tie_adapter: transpose, tokenizer_embedding: {adapter_hidden_dim: 9}}",
        "model.tie_adapter",
        "transpose of an MLP",
    ),
    ("model: {tie_embeddings: true, head_rank: 8}", "model.head_rank", "tied to the embedding, got 8"),
    (
        "training: {progressive: {building_mode: cyclic, trunk_precision: nf4}}",
        "training.progressive.trunk_precision",
        "would round every stack again after each of its visits",
    ),
    (
        "training: {progressive: {building_mode: cyclic, new_stack_precision: fp8}}",
        "training.progressive.trunk_precision",
        "fp32 here overrules it",
    ),
    (
        "model: {d_model: 100, n_heads: 12, head_dim: 7}",
        "model.head_dim",
        "is odd, and rope rotates pairs, got 7",
    ),
    (
        "model: {pos_encoding: learned, rope_scaling: {type: yarn, factor: 2.0}}",
        "model.rope_scaling",
        "scales rotary positions, but model.pos_encoding is learned",
    ),
    (
        "model: {d_model: 64, n_heads: 4, rope_scaling: {type: dynamic, factor: 2.0}, stacks: [{}, {n_heads: 32}]}\n"
        "training: {progressive: {new_stack_init: random}}",
        "model.stacks.1.rope_scaling",
        "dynamic needs at least 4 rotated numbers per head, got 2",
    ),
    ("model: {rope_scaling: {type: yarn}}", "model.rope_scaling", "set model.rope_scaling.factor"),
    *(
        (
            f"model: {{rope_scaling: {{type: linear, factor: {factor}}}}}",
            "model.rope_scaling.factor",
            "allowed: 1 to model.max_seq_len 2048",
        )
        for factor in ("5.0e-324", "0.5", "1.0e+300")
    ),
    (
        "model: {rope_scaling: {type: yarn, original_max_seq_len: 4096}}",
        "model.rope_scaling.original_max_seq_len",
        "exceeds model.max_seq_len 2048, the longest row, got 4096",
    ),
    (
        "model: {rope_scaling: {type: linear, factor: 2.0, beta_fast: 8.0}}",
        "model.rope_scaling",
        "beta_fast has no effect on rope_scaling linear",
    ),
    (
        "model: {head_dim: 4, rope_scaling: {type: longrope, factor: 2.0, short_factor: [1, 1], long_factor: [1]}}",
        "model.rope_scaling",
        "long_factor needs 2 numbers above 0, one per pair of a head, got 1",
    ),
    (
        "model: {sliding_window: 8, window_every: 2, full_block: 2}",
        "model.full_block",
        "is not among 2 blocks (model.window_every), got 2; allowed: 0 to 1",
    ),
    (
        "model: {parallel_layers: true, norm_placement: post}",
        "model.parallel_layers",
        "needs model.norm_placement pre, not post",
    ),
    (
        "model: {parallel_layers: true, first_norm: false}\ntraining: {progressive: {enabled: false}}",
        "model.parallel_layers",
        "model.first_norm false takes it away",
    ),
    (
        "model: {first_norm: false, norm_placement: post}\ntraining: {progressive: {enabled: false}}",
        "model.first_norm",
        "where model.norm_placement post has none",
    ),
    ("model: {first_norm: false}", "model.first_norm", "growth repeats its stack"),
    (
        "model: {sliding_window: 8, window_every: 3}",
        "model.window_every",
        "does not divide the 4 blocks of a stack, which growth repeats, got 3",
    ),
    (
        "model: {sliding_window: 8, window_every: 3}\n"
        "training: {stages: [{train: [all], max_steps: 1}, {train: [all], max_steps: 1, grow: {op: append}}]}",
        "model.window_every",
        "does not divide the 4 blocks",
    ),
    ("model: {n_kv_heads: 5}", "model.n_kv_heads", "must divide model.n_heads 12, got 5"),
    ("model: {n_kv_heads: 24}", "model.n_kv_heads", "allowed: 1, 2, 3, 4, 6, 12"),
    ("model: {freeze_up_proj: true, ffn_type: gelu}", "model.freeze_up_proj", "swiglu or geglu"),
    ("model: {moe: {n_experts: 4, top_k: 5}}", "model.moe.top_k", "exceeds model.moe.n_experts 4, got 5"),
    ("model: {moe: {n_experts: 6, groups: 4}}", "model.moe.groups", "allowed: 1, 2, 3, 6"),
    ("model: {moe: {n_experts: 6, groups: 2, top_groups: 3}}", "model.moe.top_groups", "from 1 to 2"),
    ("model: {moe: {n_experts: 8, groups: 8}}", "model.moe.top_k", "exceeds the 1 experts of 1 of 8 groups"),
    ("model: {moe: {n_experts: 4, first_dense: 8}}", "model.moe.first_dense", "none of the 8 layers"),
    ("model: {moe: {n_experts: 4, every: 9}}", "model.moe.every", "none of the 8 layers"),
    (
        "model: {moe: {n_experts: 4, first_dense: 1}}\ntraining: {progressive: {new_stack_init: copy}}",
        "model.moe.first_dense",
        "set training.progressive.new_stack_init to random",
    ),
    (
        "model: {moe: {n_experts: 4, first_dense: 2}}\n"
        "training: {progressive: {building_mode: independent, shared_start_fraction: 0.2}}",
        "model.moe.first_dense",
        "in other places than the stacks they are copied from",
    ),
    (
        "model: {moe: {n_experts: 4, every: 3}}\ntraining: {progressive: {building_mode: grow}}",
        "model.moe.every",
        "blocks_per_stack a multiple of every",
    ),
    (
        "model: {attention_preset: custom}",
        "model.attention_custom",
        "got null; allowed: map of attention_type",
    ),
    ("model: {attention_preset: custom, attention_custom: {}}", "model.attention_custom", "got {}"),
    (
        "model: {pos_encoding: learned, use_rope: true}",
        "model.pos_encoding",
        "disagrees with model.use_rope true",
    ),
    (
        "model: {pos_encoding: rope, use_rope: false}",
        "model.pos_encoding",
        "remove model.use_rope or set it to true",
    ),
    ("training: {seq_len: 4096}", "training.seq_len", "exceeds model.max_seq_len 2048, got 4096"),
    (
        "training: {progressive: {target_stacks: 5, max_stacks: 4}}",
        "training.progressive.target_stacks",
        "exceeds training.progressive.max_stacks 4, got 5",
    ),
    (
        "model: {architecture: {n_stacks: 13}}",
        "model.architecture.n_stacks",
        "raise training.progressive.max_stacks",
    ),
    (
        "training: {progressive: {stage_weights: [1, 2, 3]}}",
        "training.progressive.stage_weights",
        "needs one number per stack, 2 in all, got [1.0, 2.0, 3.0]",
    ),
    ("model: {attention_preset: bert_style}", "model.attention_preset", "clm needs causal attention"),
    (
        "training: {progressive: {time_interpretation: depth}}",
        "training.progressive.time_interpretation",
        "the objective clm has no noise",
    ),
    (
        DEPTH % "joint_tuning: true, independent_io: own",
        "training.progressive.independent_io",
        "is of no use to a joint phase, in which all stacks run between one embedding and one head, got 'own'",
    ),
    (
        DEPTH % "shared_start_fraction: 0.1, train_stacks: [1]",
        "training.progressive.shared_start_fraction",
        "train one stack first, and set checkpoint.init_from to that run for all of them",
    ),
    (
        (DEPTH % "shared_start_fraction: 0.1").replace(
            "bert_style}", "bert_style, stacks: [{}, {d_ff: 64}]}"
        ),
        "training.progressive.shared_start_fraction",
        "model.stacks makes them unlike, got 0.1; allowed: 0",
    ),
    ("objective: {mask_prob: 0.7}", "objective.mask_prob", "sums to 0.9, not 1"),
    ("objective: {clip: [0.8, 0.3]}", "objective.clip", "does not rise, got [0.8, 0.3]"),
    (
        "objective: {min_mask_fraction: 0.95}",
        "objective.min_mask_fraction",
        "is above objective.max_mask_fraction 0.9",
    ),
    ("objective: {noise_schedule: table}", "objective.noise_table", "the table schedule needs its shares"),
    (
        "objective: {noise_schedule: table, noise_table: [0, 0.6, 0.5, 1]}",
        "objective.noise_table",
        "does not rise from 0 to 1",
    ),
    ("objective: {predict: noise}", "objective.predict", "only gaussian corruption adds noise"),
    (
        "objective: {corruption: bert}\nmodel: {attention_preset: bert_style}\n"
        "training: {progressive: {training_objective: diffusion}}",
        "objective.corruption",
        "diffusion hides tokens",
    ),
    (
        "objective: {mask_token_id: 300}\nmodel: {attention_preset: bert_style, vocab_size: 258}\n"
        "training: {progressive: {training_objective: mlm}}",
        "objective.mask_token_id",
        "is outside the vocabulary, got 300",
    ),
    ("objective: {loss_fn: 'mine:loss'}", "objective.loss_fn", "the objective clm has its own loss"),
    ("model: {short_conv: 1}", "model.short_conv", "covers no earlier token"),
    (
        "model: {short_conv: 2, attention_preset: bert_style}\ntraining: {progressive: {training_objective: mlm}}",
        "model.short_conv",
        "is even, so a bidirectional model, which looks both ways, has no middle for it",
    ),
    (
        "generation: {sampler: unroll, block_length: 4}",
        "generation.block_length",
        "cannot be set for the sampler unroll, which goes through the stacks once",
    ),
    *(
        (
            "generation: {sampler: stream}\n" + base,
            "generation.sampler",
            "no stack of this run ends up with one of its own, got 'stream'",
        )
        for base in (BOTH_WAYS, DEPTH % "joint_tuning: true")
    ),
    (
        "model: {spectral_norm: true, zero_init_outputs: true}",
        "model.zero_init_outputs",
        "starts matrices at zero, which model.spectral_norm cannot bring to norm 1",
    ),
    (
        "model: {spectral_norm: true}\ntraining: {progressive: {new_stack_init: zero}}",
        "training.progressive.new_stack_init",
        "starts matrices at zero",
    ),
    (
        "model: {spectral_norm: true}\ntraining: {progressive: {qlora_enabled: true}}",
        "training.progressive.qlora_enabled",
        "would let adapters change matrices behind model.spectral_norm",
    ),
    (
        "model: {attention_preset: custom, attention_custom: {qk_norm: true}}",
        "model.attention_preset",
        "clm needs causal attention",
    ),
    (
        "model: {attention_overrides: {attention_mode: bidirectional}}",
        "model.attention_preset",
        "set model.attention_overrides.attention_mode to causal",
    ),
    (
        "model: {norm_placement: post}\ntraining: {progressive: {new_stack_init: zero}}",
        "training.progressive.new_stack_init",
        "allowed: copy, random; or set model.norm_placement to pre",
    ),
    (
        "training: {optimizer: {custom_params: {lr: 1, eps: 2}}}",
        "training.optimizer.custom_params",
        "set training.optimizer.lr, training.optimizer.eps instead",
    ),
    (
        "training: {optimizer: {custom_params: {params: []}}}",
        "training.optimizer.custom_params",
        "filled in by the trainer",
    ),
    (
        "training: {optimizer: {groups: [{match: a}]}}",
        "training.optimizer.groups.0",
        "give it lr or weight_decay",
    ),
    (
        "training: {progressive: {progressive_qlora: true}}",
        "training.progressive.progressive_qlora",
        "set training.progressive.qlora_enabled to true",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, trunk_lora_mode: merge, "
        "qlora_method: bottleneck}}",
        "training.progressive.trunk_lora_mode",
        "bottlenecks are not linear and cannot be folded into a weight, got 'merge'; allowed: reuse",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, trunk_lora_mode: merge, "
        "qlora_method: dora}}",
        "training.progressive.trunk_lora_mode",
        "set training.progressive.qlora_method to lora or mora",
    ),
    (
        "training: {progressive: {new_stack_precision: qlora}}",
        "training.progressive.new_stack_precision",
        "set training.progressive.qlora_enabled to true, or choose nf4",
    ),
    (
        "training: {progressive: {new_stack_precision: qlora, qlora_enabled: true, trunk_precision: fp8}}",
        "training.progressive.trunk_precision",
        "stored as nf4 from the start, got 'fp8'; allowed: nf4, null",
    ),
    (
        "training: {compile: true, residency: streamed}",
        "training.compile",
        "does not go together with streamed blocks",
    ),
    (
        "training: {dtype: float16, residency: streamed}",
        "training.dtype",
        "allowed: auto, float32, bfloat16; or set training.residency",
    ),
    (
        "training: {residency: streamed, progressive: {new_stack_precision: half}}",
        "training.progressive.new_stack_precision",
        "got 'half'; allowed: full, bfloat16, fp8, nvfp4, nf4; or set training.residency",
    ),
    (
        "training: {residency: streamed, stages: [{train: [all], max_steps: 1, precision: half}]}",
        "training.stages.0.precision",
        "cannot be taken out of gradients in host memory, got 'half'",
    ),
    (
        "model: {stacks: [{}, {}, {}], architecture: {n_stacks: 2}}",
        "model.stacks",
        "describes 3 stacks, but the run ends with 2",
    ),
    (
        "model: {stacks: [{}, {n_heads: 7}]}\ntraining: {progressive: {building_mode: cyclic}}",
        "model.stacks.1.n_heads",
        "must divide model.d_model 768, got 7",
    ),
    (
        "model: {stacks: [{}, {attention_preset: bert_style}]}\ntraining: {progressive: {new_stack_init: random}}",
        "model.stacks.1.attention_preset",
        "clm needs causal attention",
    ),
    (
        "model: {stacks: [{}, {d_ff: 64}]}",
        "training.progressive.new_stack_init",
        "model.stacks gives it other ones, got 'copy'; allowed: random",
    ),
    (
        "model: {stacks: [{}, {}, {}, {d_ff: 64}]}\ntraining: {progressive: {building_mode: grow}}",
        "model.stacks",
        "another shape than its source has; repeat the shapes",
    ),
    (
        "model: {architecture: {n_stacks: 6}}\ntraining: {progressive: {building_mode: grow, growth_factor: 4}}",
        "training.progressive.growth_factor",
        "must divide the 6 stacks that the run ends with, got 4; allowed: 2, 3",
    ),
    (
        "model: {architecture: {n_stacks: 5}}\ntraining: {progressive: {building_mode: grow}}",
        "training.progressive.growth_factor",
        "end with a number of stacks that 2, 3 or 4 divides",
    ),
    (
        "training: {progressive: {building_mode: grow, growth_layers: [0, 1]}}",
        "training.progressive.growth_layers",
        "must name a source for each of the 8 blocks, not for 2",
    ),
    (
        "training: {progressive: {building_mode: grow, growth_layers: [0, 1, 2, 3, 0, 1, 2, 9]}}",
        "training.progressive.growth_layers",
        "names blocks that the small rack does not have: 9",
    ),
    (
        "model: {stacks: [{}, {}]}\n"
        "training: {progressive: {building_mode: grow, growth_layers: [0, 1, 2, 3, 0, 1, 2, 3]}}",
        "training.progressive.growth_layers",
        "needs stacks of one shape",
    ),
    (
        "training: {progressive: {building_mode: independent, train_stacks: [1, 2]}}",
        "training.progressive.train_stacks",
        "names positions that are not there, got [1, 2]; allowed: 0 to 1",
    ),
    (
        "training: {progressive: {building_mode: independent, train_stacks: [1, 1]}}",
        "training.progressive.train_stacks",
        "names a position twice",
    ),
    (
        "training: {progressive: {building_mode: independent, train_stacks: [0, 1]}}",
        "training.progressive.train_stacks",
        "after stacks that need them, got [0, 1]; put 1 first",
    ),
    (
        "training: {progressive: {building_mode: independent, train_stacks: [0]}}",
        "training.progressive.train_stacks",
        "or set checkpoint.init_from to the run that has trained it",
    ),
    (
        "training: {progressive: {building_mode: independent, train_head: always}}",
        "training.progressive.train_head",
        "allowed: auto, first, never",
    ),
    (
        "training: {progressive: {joint_tuning_backbone: qlora}}",
        "training.progressive.joint_tuning_backbone",
        "set training.progressive.qlora_enabled to true",
    ),
    ("training: {stages: [{train: [all]}]}", "training.stages.0", "needs exactly one budget; give it one of"),
    (
        "training: {stages: [{train: [all], epochs: 1, max_steps: 2}]}",
        "training.stages.0",
        "needs exactly one budget, not max_steps and epochs",
    ),
    (
        "training: {stages: [{train: [all], max_steps: 2, seq_len: 4000}]}",
        "training.stages.0.seq_len",
        "exceeds model.max_seq_len 2048, got 4000",
    ),
    (
        "training: {stages: [{train: [all], max_steps: 2, schedule: [4, 4]}]}",
        "training.stages.0.schedule",
        "must start before it ends, got [4, 4]",
    ),
    (
        "training: {stages: [{train: [all], max_steps: 2}, {train: [new], max_steps: 2, grow: {op: append, layers: [0]}}]}",
        "training.stages.1.grow.layers",
        "is a map for duplicate, not for append",
    ),
    (
        "training: {optimizer: {optimizer_type: RAdam, custom_params: {weight_decay: 1}}}",
        "training.optimizer.custom_params",
        "set training.optimizer.weight_decay instead",
    ),
    (
        "training: {optimizer: {optimizer_type: SGD, memory: int8}}",
        "training.optimizer.memory",
        "of AdamW, Adam, Muon in eight bits, not those of SGD, got 'int8'; allowed: full",
    ),
    (
        "training: {optimizer: {memory: fused}}",
        "training.max_grad_norm",
        "got 1.0; allowed: 0; or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {max_grad_norm: 0, gradient_accumulation_steps: 2, optimizer: {memory: fused}}",
        "training.gradient_accumulation_steps",
        "allowed: 1; raise training.batch_size instead",
    ),
    (
        "training: {max_grad_norm: 0, on_nonfinite: skip, optimizer: {memory: fused}}",
        "training.on_nonfinite",
        "allowed: stop, rollback; or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {max_grad_norm: 0, spike_policy: skip, optimizer: {memory: fused}}",
        "training.spike_policy",
        "allowed: off, warn, rollback; or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {max_grad_norm: 0, recheck: true, deterministic: true, optimizer: {memory: fused}}",
        "training.recheck",
        "allowed: false; or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {recheck: true}",
        "training.recheck",
        "set training.deterministic to true",
    ),
    (
        "training: {recheck: true, deterministic: true, dtype: float16}",
        "training.dtype",
        "scales gradients, which training.recheck cannot compute again, got 'float16'; use bfloat16",
    ),
    (
        "training: {max_grad_norm: 0, dtype: float16, optimizer: {memory: fused}}",
        "training.dtype",
        "got 'float16'; compute in bfloat16, or set",
    ),
    (
        "training: {max_grad_norm: 0, optimizer: {memory: fused}, progressive: {new_stack_precision: half}}",
        "training.progressive.new_stack_precision",
        "got 'half'; compute in bfloat16, or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {max_grad_norm: 0, optimizer: {memory: fused}, "
        "stages: [{train: [all], max_steps: 2, precision: half}]}",
        "training.stages.0.precision",
        "got 'half'; compute in bfloat16, or set training.optimizer.memory to int8_nomaster",
    ),
    (
        "training: {stages: [{train: [all], max_steps: 2, precision: qlora}]}",
        "training.stages.0.precision",
        "got 'qlora'; set training.progressive.qlora_enabled to true, or choose nf4",
    ),
    (
        "training: {stages: [{train: [heads], max_steps: 2}]}",
        "training.stages.0",
        "trains 'heads', which matches nothing in a rack of 2 stacks with 4, 4 blocks; known: all, new,",
    ),
    (
        "training: {progressive: {time_interpretation: depth}}",
        "training.progressive.time_interpretation",
        "the objective clm has no noise, got 'depth'; allowed: auto, none",
    ),
    (
        BOTH_WAYS.replace("enabled: false", "enabled: false, time_interpretation: depth"),
        "training.progressive.time_interpretation",
        "no stack has a stage of its own, got 'depth'",
    ),
    (
        DEPTH % "num_time_steps: 300",
        "training.progressive.num_time_steps",
        "2 stacks of 100 time steps make 200, got 300; allowed: 200",
    ),
    (
        DEPTH % "stack_time_mapping: custom",
        "training.progressive.stack_time_mapping",
        "custom without boundaries",
    ),
    (
        DEPTH % "stack_time_mapping: custom, time_boundaries: [0, 0.2, 0.6, 1]",
        "training.progressive.time_boundaries",
        "4 boundaries for 2 stacks",
    ),
    (
        DEPTH % "stack_time_mapping: custom, time_boundaries: [0, 0, 1]",
        "training.progressive.time_boundaries",
        "not monotone at number 2",
    ),
    (
        DEPTH % "time_step_mask_fractions: [0.9, 0.15]",
        "training.progressive.time_step_mask_fractions",
        "not lightest first",
    ),
    (
        "training: {stages: [{train: [all], max_steps: 1, noise: [0, 1]}]}",
        "training.stages.0.noise",
        "the objective clm hides no tokens",
    ),
    (
        BOTH_WAYS.replace(
            "{progressive", "{stages: [{train: [all], max_steps: 1, eval_noise: [1, 0]}], progressive"
        ),
        "training.stages.0.eval_noise",
        "is no range, got [1.0, 0.0]",
    ),
    ("objective: {mask_prob: 0.7}", "objective.mask_prob", "sums to 0.9, not 1, got 0.7"),
    ("objective: {clip: [0.8, 0.3]}", "objective.clip", "does not rise, got [0.8, 0.3]"),
    (
        "objective: {min_mask_fraction: 0.95}",
        "objective.min_mask_fraction",
        "is above objective.max_mask_fraction 0.9, got 0.95",
    ),
    (
        "objective: {noise_schedule: table}",
        "objective.noise_table",
        "the table schedule needs its shares, got null",
    ),
    (
        "objective: {noise_schedule: table, noise_table: [0, 0.5, 0.5, 1]}",
        "objective.noise_table",
        "does not rise from 0 to 1 at every entry",
    ),
    (
        "objective: {predict: noise}",
        "objective.predict",
        "only gaussian corruption adds noise, got 'noise'; allowed: token; set objective.corruption to gaussian",
    ),
    (
        BOTH_WAYS + "\nobjective: {corruption: bert}",
        "objective.corruption",
        "random and kept ones would have no likelihood bound, got 'bert'",
    ),
    (
        BOTH_WAYS.replace("bert_style}", "bert_style, vocab_size: 9}") + "\nobjective: {mask_token_id: 9}",
        "objective.mask_token_id",
        "is outside the vocabulary, got 9; allowed: 0 to 8",
    ),
    (
        "objective: {loss_fn: 'some:function'}",
        "objective.loss_fn",
        "the objective clm has its own loss, got 'some:function'; set training.progressive.training_objective to custom",
    ),
    ("data: {source: text}", "data.path", "the source text needs a path, got null; allowed: files or globs"),
    ("data: {source: hf}", "data.path", "the name of a data set"),
    ("data: {path: a.txt}", "data.path", "the source stdlib reads no path"),
    (MLA % "mla_rope_dim: 3", "model.attention_overrides.mla_rope_dim", "an even number such as 4"),
    (MLA % "mla_rope_dim: 0", "model.attention_overrides.mla_rope_dim", "would see no positions"),
    (
        "model: {attention_preset: custom, attention_custom: {attention_type: mla, attention_mode: causal, "
        "mla_rope_dim: 4}, pos_encoding: learned}",
        "model.attention_custom.mla_rope_dim",
        "is for rotary positions, not for learned, got 4; allowed: 0, null",
    ),
    (
        "model: {sliding_window: 8, attention_overrides: {kernel_mode: linear}}",
        "model.attention_overrides.kernel_mode",
        "never builds the single scores that model.sliding_window would change",
    ),
    (
        "model: {attention_preset: mla_attention, attention_overrides: {attention_mode: causal}, score_width: 9}",
        "model.score_width",
        "latent attention scales its scores by itself",
    ),
    (
        "model: {score_width: 9, attention_overrides: {kernel_type: gaussian}}",
        "model.score_width",
        "a kernel scales what it compares by itself, got 9.0; allowed: null",
    ),
    (MLA % "qk_norm: true", "model.attention_overrides.qk_norm", "mla normalises its latents"),
    (
        "model: {attention_preset: mla_attention, qk_norm: true, attention_overrides: {attention_mode: causal}}",
        "model.qk_norm",
        "mla normalises its latents",
    ),
    (
        "model: {attention_overrides: {kernel_type: laplacian, kernel_mode: linear}}",
        "model.attention_overrides.kernel_mode",
        "the laplacian kernel has no positive random features",
    ),
    (
        "model: {attention_preset: mlgka, attention_overrides: {attention_mode: causal, kernel_mode: linear}}",
        "model.attention_overrides.kernel_mode",
        "got 'linear'; allowed: score, exact",
    ),
    (
        "model: {stacks: [{}, {attention_preset: mla_attention, attention_overrides: {attention_mode: causal, "
        "mla_rope_dim: 5}}]}\ntraining: {progressive: {new_stack_init: random}}",
        "model.stacks.1.attention_overrides.mla_rope_dim",
        "rope rotates pairs",
    ),
]


@pytest.mark.parametrize(
    ("text", "key", "message"), BROKEN, ids=[f"{key}-{i}" for i, (_, key, _) in enumerate(BROKEN)]
)
def test_a_broken_rule_is_named(text, key, message):
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_dict(parse(text, "").data)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert message in str(caught.value)


def test_every_rule_is_broken_by_an_example():
    found = set()
    for text, _, _ in BROKEN:
        config = StackWiseConfig(**parse(text, "").data)
        found |= {check.__name__ for _, check in RULES if check(config)}
    assert found == {check.__name__ for _, check in RULES}


def test_rules_and_notes_name_keys_that_exist():
    for path in [path for keys, _ in RULES for path in keys] + [tuple(key.split(".")) for key, _, _ in INERT]:
        assert field_at(StackWiseConfig, path)[1] is not None, path


ALLOWED = [
    MLA % "mla_rq: 0",
    MLA % "kernel_type: gaussian, kernel_mode: linear",
    "model: {attention_overrides: {kernel_mode: linear}}",
    "model: {pos_encoding: none, attention_preset: mla_attention, attention_overrides: {attention_mode: causal}}",
    "model: {d_model: 12, n_heads: 4, pos_encoding: none}",
    "model: {d_model: 100, n_heads: 12, head_dim: 8}",
    "model: {sliding_window: 8, window_every: 3}\ntraining: {progressive: {enabled: false}}",
    "model: {sliding_window: 8, window_every: 2, full_block: 1, first_norm: false}\ntraining: {progressive: {building_mode: cyclic}}",
    "model: {pos_encoding: alibi, parallel_layers: true}",
    "model: {max_seq_len: 4096, rope_scaling: {type: yarn, original_max_seq_len: 2048}}",
    "model: {architecture: {n_stacks: 13}}\ntraining: {progressive: {enabled: false}}",
    "model: {architecture: {n_stacks: 13}}\ntraining: {progressive: {target_stacks: 3}}",
    "model: {norm_placement: post}\ntraining: {progressive: {enabled: false, new_stack_init: zero}}",
    "training: {progressive: {enabled: false, stage_weights: [1, 2, 3]}}",
    "model: {attention_preset: bert_style, attention_overrides: {attention_mode: causal}}",
    "model: {attention_preset: custom, attention_custom: {attention_mode: causal}}",
    "model: {pos_encoding: learned, use_rope: false}",
    "data: {source: hf, path: [a, b]}",
    "model: {stacks: [{}, {d_ff: 64}]}\ntraining: {progressive: {new_stack_init: random}}",
    "model: {stacks: [{}, {d_ff: 64}]}\ntraining: {progressive: {building_mode: cyclic}}",
    "model: {stacks: [{}, {n_blocks: 7}]}",
    "model: {stacks: [{}, {d_ff: 9}, {}, {d_ff: 9}]}\ntraining: {progressive: {building_mode: grow, growth_factor: 2}}",
    "model: {architecture: {n_stacks: 6}}\ntraining: {progressive: {building_mode: grow}}",
    "training: {progressive: {building_mode: independent, train_stacks: [1]}}",
    "training: {progressive: {building_mode: independent, train_stacks: [0]}}\ncheckpoint: {init_from: runs/a}",
    "training: {progressive: {building_mode: append, train_head: always}}",
    "model: {norm_placement: post}\ntraining: {progressive: {building_mode: cyclic, new_stack_init: zero}}",
    "training: {progressive: {qlora_enabled: true, progressive_qlora: true, qlora_method: dora}}",
    "training: {progressive: {new_stack_precision: qlora, qlora_enabled: true, trunk_precision: nf4}}",
    "training: {progressive: {qlora_enabled: true, progressive_qlora: true, trunk_lora_mode: merge}}",
    "training: {progressive: {qlora_enabled: true, qlora_method: bottleneck, trunk_lora_mode: merge}}",
    "training: {compile: true, progressive: {enabled: false, trunk_residency: streamed}}",
    "training: {dtype: float16, progressive: {trunk_residency: streamed}}",
]


@pytest.mark.parametrize("text", ALLOWED)
def test_a_rule_holds_only_where_it_applies(text):
    StackWiseConfig.from_dict(parse(text, "").data).validate()


def test_use_rope_follows_pos_encoding_where_only_that_is_set():
    config = StackWiseConfig.from_dict({"model": {"pos_encoding": "learned"}})
    assert config.model.use_rope is False
    config.model.pos_encoding = "rope"
    assert config.model.use_rope is True
    config.model.use_rope = False
    with pytest.raises(ConfigError, match="disagrees"):
        config.validate()


def test_attention_presets():
    def attention(**model):
        return StackWiseConfig(model=model).model.attention

    plain = {
        "attention_type": "mha",
        "attention_mode": "causal",
        "n_kv_heads": 12,
        "qk_norm": False,
        "kernel_type": "linear",
        "kernel_dim": 64,
        "kernel_mode": "score",
        "kernel_bandwidth": 1.0,
        "kernel_norm": "l2",
        "mla_rq": 192,
        "mla_rkv": 96,
        "mla_rope_dim": 32,
    }
    assert attention() == plain
    assert attention(attention_preset="mla_attention") == plain | {
        "attention_type": "mla",
        "attention_mode": "bidirectional",
    }
    assert attention(attention_preset="mla_attention", pos_encoding="none")["mla_rope_dim"] == 0
    assert attention(attention_preset="mla_attention", n_heads=128)["mla_rope_dim"] == 2
    kernel = {"attention_mode": "bidirectional", "kernel_type": "gaussian"}
    assert attention(attention_preset="kernel_attention") == plain | kernel
    mlgka = {"attention_type": "mla", "attention_mode": "bidirectional", "n_kv_heads": 3}
    assert attention(attention_preset="mlgka") == plain | mlgka | {"kernel_type": "laplacian"}
    assert attention(attention_preset="bert_style")["attention_mode"] == "bidirectional"
    gqa = attention(attention_preset="efficient_gqa")
    assert (gqa["attention_mode"], gqa["n_kv_heads"]) == ("bidirectional", 3)
    assert attention(attention_preset="efficient_gqa", n_heads=2)["n_kv_heads"] == 1
    assert attention(attention_preset="efficient_gqa", n_heads=18)["n_kv_heads"] == 3
    assert attention(attention_preset="efficient_gqa", n_kv_heads=6)["n_kv_heads"] == 6
    custom = {"attention_mode": "causal"}
    assert attention(attention_preset="custom", attention_custom=custom, qk_norm=True) == {
        **attention(),
        "qk_norm": True,
    }
    assert attention(attention_custom={"attention_mode": "bidirectional"})["attention_mode"] == "causal"
    assert attention(qk_norm=True, attention_overrides={"qk_norm": False})["qk_norm"] is False


NOTED = [
    (
        "model: {tokenizer_embedding: {freeze_embeddings: false}}",
        "freeze_embeddings has no effect: the embedding's table",
    ),
    (
        "model: {tie_embeddings: true, tie_adapter: transpose}",
        "model.tie_adapter has no effect: the head is not tied to a table of another width",
    ),
    (
        "model: {attention_overrides: {mla_rq: 5}}",
        "attention_overrides.mla_rq has no effect: the attention is not mla",
    ),
    ("model: {attention_overrides: {kernel_dim: 5}}", "the attention has no kernel"),
    (
        "model: {attention_preset: custom, attention_custom: {attention_mode: causal, kernel_norm: l1}}",
        "model.attention_custom.kernel_norm has no effect: the kernel is not laplacian",
    ),
    ("model: {attention_overrides: {kernel_bandwidth: 2.0}}", "the linear kernel has no bandwidth"),
    (MLA % "mla_rkv: 1536", "the cache grows instead of shrinking"),
    ("model: {attention_overrides: {kernel_type: uniform}}", "it is not rotation invariant"),
    (
        "model: {attention_overrides: {kernel_type: laplacian, kernel_norm: l1}}",
        "of the l1 norm under rotary",
    ),
    (
        "model: {attention_overrides: {kernel_type: gaussian, kernel_mode: exact}}",
        "all pairs of tokens at once",
    ),
    ("model: {window_every: 2}", "model.window_every has no effect: model.sliding_window is null"),
    ("model: {attention_sinks: 2}", "model.attention_sinks has no effect: model.sliding_window is null"),
    (
        "model: {sliding_window: 8, full_block: 0}",
        "model.full_block has no effect: every block has the window",
    ),
    (
        "model: {sliding_window: 8, local_rope_theta: 100.0, pos_encoding: none}",
        "model.local_rope_theta has no effect: positions are not rotary",
    ),
    (
        "model: {sliding_window: 8, local_rope_theta: 100.0, rope_theta: 500.0}",
        "model.rope_theta has no effect: every block has a window, and model.local_rope_theta is set",
    ),
    ("model: {attention_custom: {qk_norm: true}}", "model.attention_custom has no effect"),
    (
        "model: {pos_encoding: learned, rope_theta: 500}",
        "model.rope_theta has no effect: positions are not rotary",
    ),
    (
        "model: {architecture: {n_stacks: 4}}\ntraining: {progressive: {target_stacks: 3}}",
        "target_stacks wins",
    ),
    (
        "training: {max_steps: 9, epochs_per_stack: 2}",
        "training.epochs_per_stack has no effect: training.max_steps wins",
    ),
    ("training: {decay_fraction: 0.5}", "training.lr_schedule is not wsd"),
    ("training: {min_lr_ratio: 0.5, lr_schedule: constant}", "the learning rate is constant"),
    ("training: {new_stack_lr: 1, progressive: {enabled: false}}", "training.new_stack_lr has no effect"),
    ("training: {trunk_lr: 1, progressive: {joint_tuning: false}}", "older stacks never train again"),
    (
        "training: {optimizer: {adam_lr: 1}}",
        "training.optimizer.adam_lr has no effect: the optimizer is not Muon",
    ),
    ("training: {optimizer: {momentum: 0.5}}", "only SGD and Muon read it"),
    (
        "training: {optimizer: {optimizer_type: SGD, betas: [0.5, 0.5]}}",
        "training.optimizer.betas has no effect",
    ),
    ("training: {optimizer: {optimizer_type: SGD, eps: 1e-3}}", "training.optimizer.eps has no effect"),
    (
        "training: {progressive: {enabled: false, new_stack_init: random}}",
        "training.progressive.enabled is false",
    ),
    ("training: {progressive: {joint_tuning: false, joint_tuning_fraction: 0.5}}", "there is no joint phase"),
    ("training: {progressive: {qlora_rank: 4}}", "training.progressive.qlora_enabled is false"),
    (
        "training: {progressive: {qlora_enabled: true, qlora_rank_pattern: linear}}",
        "training.progressive.qlora_strategy is not progressive",
    ),
    (
        "training: {progressive: {qlora_enabled: true, qlora_configs: {0: {rank: 1, alpha: 1}}}}",
        "training.progressive.qlora_strategy is not variable",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora_rank: 4}}",
        "training.progressive.progressive_qlora is false",
    ),
    (
        "training: {progressive: {qlora_enabled: true, qlora_method: mora, qlora_alpha: 4}}",
        "training.progressive.qlora_alpha has no effect: MoRA and bottlenecks are not scaled",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, target_stacks: 1}}",
        "training.progressive.progressive_qlora has no effect: no stack is added to a trained one",
    ),
    (
        "training: {progressive: {qlora_enabled: true, progressive_qlora: true, progressive_qlora_rank: 16}}",
        "training.progressive.progressive_qlora_rank is not below qlora_rank",
    ),
    (
        "training: {progressive: {trunk_precision: nf4, trunk_strategy: trainable}}",
        "training.progressive.trunk_precision has no effect: no stack is ever frozen",
    ),
    ("training: {progressive: {trunk_precision: nf4, enabled: false}}", "no stack is ever frozen"),
    (
        "training: {progressive: {fake_quant: true, trunk_precision: fp32}}",
        "training.progressive.fake_quant has no effect: frozen stacks are stored in fp32",
    ),
    (
        "training: {stages: [{train: [all], max_steps: 2, precision: nf4}], progressive: {new_stack_precision: full}}",
        "new_stack_precision has no effect: every stage in which stacks join has a precision of its own",
    ),
    (
        "training: {stages: [{train: [all], max_steps: 2, cache: auto}], progressive: {cache_activations: true}}",
        "cache_activations has no effect: every stage says by itself",
    ),
    (
        "training: {unit: block, progressive: {building_mode: grow}}",
        "training.unit has no effect: training.progressive.building_mode is grow",
    ),
    (
        "training: {unit: rack, progressive: {building_mode: grow}}",
        "training.progressive.building_mode has no effect: training.unit is rack",
    ),
    (
        "training: {progressive: {target_stacks: 1, new_stack_init: zero}}",
        "training.progressive.new_stack_init has no effect: no stack is added",
    ),
    (
        "training: {max_steps: 4, progressive: {building_mode: cyclic, cycle_steps: 2}}",
        "training.progressive.cycle_steps wins",
    ),
    (
        "training: {progressive: {building_mode: grow, growth_pattern: middle, growth_layers: [0, 1, 2, 3, 0, 1, 2, 3]}}",
        "training.progressive.growth_layers wins",
    ),
    ("training: {progressive: {building_mode: grow, growth_at: 0.5}}", "lies outside 0.10 to 0.20"),
    (
        "model: {architecture: {blocks_per_stack: 2}}\ntraining: {progressive: {building_mode: independent}}",
        "fewer than 3 blocks per stack",
    ),
    (
        "model: {architecture: {n_stacks: 5}}\ntraining: {progressive: {building_mode: independent}}",
        "more than 4 stacks",
    ),
    ("training: {progressive: {building_mode: independent}}", "every stack learns the whole task by itself"),
    *(
        (
            f"objective: {{weight: clipped, clip: [0.2, 0.9]}}\n{DEPTH % 'time_overlap: 0.1'}",
            f"objective.{name} has no effect: every stage draws from the noise of its own",
        )
        for name in ("weight", "clip")
    ),
    (
        f"objective: {{weight: clipped, clip: [0.2, 0.9]}}\n{BOTH_WAYS.replace('diffusion', 'mlm')}",
        "objective.clip has no effect: training.progressive.training_objective is mlm",
    ),
    *(
        (
            BOTH_WAYS.replace("enabled: false", f"enabled: false, time_interpretation: input, {name}: 50"),
            f"training.progressive.{name} has no effect: only training.progressive.time_encoding_type learned has",
        )
        for name in ("num_time_steps", "time_per_stack")
    ),
    ("data: {eval_path: b.txt, eval_fraction: 0.5}", "data.eval_path wins"),
    ("data: {packing: false, doc_mask: false}", "data.doc_mask has no effect"),
    ("data: {bucketing: true}", "data.bucketing has no effect: packed rows"),
    ("data: {text_key: body}", "data.text_key has no effect"),
    ("generation: {temperature: 0, top_k: 3}", "generation.top_k has no effect: temperature 0 is greedy"),
    ("generation: {temperature: 0, top_p: 0.5}", "generation.top_p has no effect"),
    ("generation: {temperature: 0, seed: 3}", "generation.seed has no effect"),
    *(
        (
            f"generation: {{{key}}}",
            f"{key.split(':')[0]} has no effect: a causal model continues token by token",
        )
        for key in ("sampler: remask", "steps: 3", "grid: linear", "block_length: 4", "threshold: 0.5")
    ),
    (
        f"generation: {{sampler: threshold, steps: 3}}\n{BOTH_WAYS}",
        "generation.steps has no effect: generation.sampler is threshold",
    ),
    (
        "generation: {sampler: unroll, grid: linear}\n" + DEPTH % "joint_tuning: false",
        "generation.grid has no effect: generation.sampler is unroll",
    ),
    (
        f"generation: {{threshold: 0.5}}\n{BOTH_WAYS}",
        "generation.threshold has no effect: generation.sampler is conf",
    ),
    *(
        (
            f"tracking: {{{key}}}\n{BOTH_WAYS.replace('diffusion', 'mlm')}",
            f"{key.split(':')[0]} has no effect: the run does not learn to write text",
        )
        for key in ("sample_interval: 3", "sample_prompt: To be")
    ),
    (f"generation: {{repetition_penalty: 2.0}}\n{BOTH_WAYS}", "generation.repetition_penalty has no effect"),
    (
        "tracking: {sinks: [csv], project: mine}",
        "tracking.project has no effect: tracking.sinks names neither trackio nor wandb",
    ),
    ("model: {tie_embeddings: true}", "false lets it train at every stage"),
    ("training: {progressive: {joint_tuning: false}}", "training.progressive.joint_tuning is off"),
    ("training: {max_steps: 10, warmup_steps: 10}", "the learning rate never reaches its peak"),
    (
        "training: {progressive: {enabled: false, trunk_residency: streamed}}",
        "training.progressive.trunk_residency has no effect: no stack is ever frozen",
    ),
    (
        "checkpoint: {keep_best: 2}",
        "checkpoint.keep_best has no effect: evaluation.interval is null",
    ),
    (
        "training: {gradient_checkpointing: true, residency: streamed, progressive: {building_mode: grow}}",
        "training.gradient_checkpointing has no effect: streamed blocks are computed again anyway",
    ),
]


@pytest.mark.parametrize(("text", "note"), NOTED, ids=[note[:40] for _, note in NOTED])
def test_a_key_without_effect_is_noted(text, note):
    notes = StackWiseConfig.from_dict(parse(text, "").data).notes()
    assert any(note in line for line in notes)


@pytest.mark.parametrize("mode", ["end_to_end", "append", "prepend", "grow", "independent", "cyclic"])
def test_every_key_of_another_program_is_noted(mode):
    values = {
        "trunk_strategy": "trainable",
        "new_stack_init": "random",
        "global_head_blocks": 0,
        "joint_tuning_fraction": 0.5,
        "joint_tuning_backbone": "frozen",
        "joint_lr": 0.5,
        "growth_factor": 2,
        "growth_at": 0.2,
        "growth_pattern": "middle",
        "growth_schedule": "own",
        "growth_optimizer": "carry",
        "rewarmup_fraction": 0.5,
        "cycle_sweeps": 3,
        "cycle_steps": 7,
        "cycle_order": "random",
        "train_stacks": [1],
        "stage_weights": [1, 2],
    }
    if mode == "end_to_end":
        values |= {"enabled": False, "max_stacks": 3, "target_stacks": 2, "trunk_strategy": "trainable"}
    else:
        values["building_mode"] = mode
    joint = set() if mode == "append" else {key for key in values if key.startswith("joint")}
    own = {
        "end_to_end": {"enabled"},
        "append": {"trunk_strategy", "new_stack_init", "global_head_blocks", "joint_tuning_fraction"}
        | {"joint_tuning_backbone", "joint_lr", "growth_optimizer", "rewarmup_fraction", "stage_weights"},
        "prepend": {
            "trunk_strategy",
            "new_stack_init",
            "growth_optimizer",
            "rewarmup_fraction",
            "stage_weights",
        },
        "grow": {"new_stack_init", "growth_factor", "growth_at", "growth_pattern", "growth_optimizer"}
        | {"growth_schedule", "rewarmup_fraction"},
        "independent": {"rewarmup_fraction", "train_stacks", "stage_weights"},
        "cyclic": {"cycle_sweeps", "cycle_steps", "cycle_order", "growth_optimizer", "rewarmup_fraction"},
    }[mode]
    if mode == "end_to_end":
        own |= {"trunk_strategy"}  # qlora has a meaning there
    notes = StackWiseConfig.from_dict({"training": {"progressive": values}}).notes()
    noted = {note.split()[0].rpartition(".")[2] for note in notes if "has no effect" in note}
    assert noted == (values.keys() | joint) - own - {"building_mode"}


def test_every_growth_key_is_noted_with_hand_written_stages():
    stages = [{"train": ["all"], "max_steps": 1}]
    values = {"cycle_sweeps": 3, "trunk_strategy": "trainable", "joint_tuning": False, "growth_at": 0.2}
    config = {"training": {"stages": stages, "max_steps": 3, "unit": "block", "progressive": values}}
    notes = [note for note in StackWiseConfig.from_dict(config).notes() if "has no effect" in note]
    assert len(notes) == 6
    assert all("training.stages says what happens" in note for note in notes)


def test_keys_that_some_stage_leaves_in_force_are_not_noted():
    first, second = (
        {"train": ["all"], "max_steps": 1},
        {"train": ["new"], "grow": {"op": "append"}, "max_steps": 1},
    )
    keys = {
        "new_stack_precision": "full",
        "fake_quant": True,
        "cache_activations": False,
        "cache_dtype": "fp8",
    }
    for own in ({"precision": "nf4"}, {"cache": "auto"}):
        training = {"stages": [first, {**second, **own}], "progressive": keys}
        notes = StackWiseConfig.from_dict({"training": training}).notes()
        inert = "cache_dtype" if "precision" in own else "fake_quant"
        assert [note.split()[0] for note in notes] == [f"training.progressive.{inert}"]


CLIPPED = "objective: {weight: clipped, clip: [0.2, 0.9]}\n"
STAGES = """model: {attention_preset: bert_style}
training:
  stages: [{train: [all], max_steps: 1, noise: [0, 1]}, {train: [all], max_steps: 1%s}]
  progressive: {training_objective: diffusion, joint_tuning: false}
"""


@pytest.mark.parametrize(
    ("text", "inert"),
    [
        (CLIPPED + BOTH_WAYS, False),
        (CLIPPED + DEPTH % "shared_start_fraction: 0.2", False),
        (CLIPPED + "checkpoint: {init_from: runs/a}\n" + DEPTH % "shared_start_fraction: 0.2", True),
        (CLIPPED + DEPTH % "joint_tuning: true", False),
        (CLIPPED + DEPTH.replace("independent", "append") % "time_interpretation: depth", False),
        (CLIPPED + DEPTH.replace("independent", "prepend") % "time_overlap: 0.1", True),
        (CLIPPED + STAGES % "", False),
        (CLIPPED + STAGES % ", noise: [0, 1]", True),
        ("objective: {weight: uniform}\n" + DEPTH % "time_overlap: 0.1", False),
    ],
)
def test_shares_are_clipped_in_the_stages_that_have_no_noise_of_their_own(text, inert):
    notes = StackWiseConfig.from_dict(parse(text, "").data).notes()
    noted = [note.split()[0] for note in notes if "has no effect: every stage draws" in note]
    assert noted == (["objective.weight", "objective.clip"] if inert else [])


def test_nothing_is_noted_about_defaults():
    assert StackWiseConfig().notes() == []
    assert StackWiseConfig.from_dict(StackWiseConfig().to_dict()).notes() == []
    assert StackWiseConfig.from_dict({"training": {"decay_fraction": 0.2}}).notes() == []


# Deprecated keys


def test_n_blocks_and_attention_type_load_with_one_warning():
    text = {
        "n_blocks": 8,
        "attention_type": "standard",
        "architecture": {"n_stacks": 2, "blocks_per_stack": 4},
    }
    with pytest.warns(DeprecationWarning, match="deprecated: model") as caught:
        config = StackWiseConfig.from_dict({"model": text})
    assert len(caught) == 1
    assert "model.n_blocks" in str(caught[0].message)
    assert config.model.attention["attention_type"] == "mha"
    assert config.model.architecture.total_blocks == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StackWiseConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "model", [{"n_blocks": 12}, {"architecture": {"n_blocks": 12}}, {"n_blocks": 12, "architecture": None}]
)
def test_n_blocks_alone_gives_the_number_of_stacks(model):
    with pytest.warns(DeprecationWarning, match="deprecated: model"):
        config = StackWiseConfig.from_dict({"model": model})
    assert config.model.architecture.n_stacks == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"n_blocks": 7, "architecture": {"n_stacks": 2}},
            "must equal n_stacks * blocks_per_stack, got 7; allowed: 2 * 4",
        ),
        ({"n_blocks": 7}, "must be a multiple of blocks_per_stack, got 7"),
        ({"n_blocks": "8"}, "model.n_blocks: wrong value, got '8'; allowed: whole number >= 1"),
        ({"n_blocks": 8, "architecture": {"n_blocks": 12}}, "model.architecture.n_blocks: must equal"),
        (
            {"attention_type": "mls"},
            "model.attention_type: wrong value, got 'mls'; allowed: mha, mla, standard",
        ),
        ({"attention_type": 3}, "model.attention_type: wrong value, got 3"),
    ],
)
def test_wrong_deprecated_keys_are_named(model, message):
    with pytest.warns(DeprecationWarning, match="deprecated: model"), pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_dict({"model": model})
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_no_key_is_both_deprecated_and_known():
    keys = {path for path, _ in walk(StackWiseConfig)}
    assert not keys & {
        ("model", "n_blocks"),
        ("model", "architecture", "n_blocks"),
        ("model", "attention_type"),
    }


def test_a_rate_that_no_adapter_follows_is_noted():
    for rate, told in (("lr", True), ("io_lr", True), ("adapter_lr", False)):
        for train in (["lora:stack"], ["lora:stack", "head"]):
            stages = [{"train": train, "max_steps": 1, rate: 1e-3}]
            training = {"stages": stages, "progressive": {"qlora_enabled": True}}
            config = {"training": training, "checkpoint": {"init_from": "runs/a"}}
            notes = StackWiseConfig.from_dict(config).notes()
            assert any("adapter_lr" in note for note in notes) == (told and len(train) == 1)
