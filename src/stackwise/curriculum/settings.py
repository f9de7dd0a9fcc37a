"""Settings of the progressive run: what grows, what trains, and how a new stack starts."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import JsonValue

from stackwise.adapters.settings import AdapterKeys
from stackwise.config.base import Settings
from stackwise.config.types import (
    BelowOne,
    Depth,
    Flag,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    Text,
    UnitFloat,
)
from stackwise.objectives.settings import TimeKeys
from stackwise.precision.settings import PrecisionKeys, StackPrecision
from stackwise.trunk.settings import TrunkKeys

Trains = Literal["auto", "always", "first", "never"]
Start = Literal["copy", "zero", "random"]
StateChange = Literal["reset", "carry", "copy"]


class GrowthSettings(Settings):
    """What a stage adds before it trains."""

    op: Literal["append", "prepend", "duplicate"]
    """append puts a stack next to the head, prepend next to the embedding; duplicate repeats what there is."""
    n_blocks: Depth | None = None
    """Blocks of a new stack. null: `model.architecture.blocks_per_stack`."""
    init: Start = "copy"
    """Start of the new stacks, as in `training.progressive.new_stack_init`."""
    factor: Annotated[Int, Ge(2)] = 2
    """How often duplicate repeats the sequence of stacks."""
    layers: Annotated[list[NonNegativeInt], MinLen(1)] | None = None
    """For duplicate: block i of the new rack is a copy of block `layers[i]` of the old one. null: by `factor`."""
    blocks: Annotated[list[dict[str, JsonValue]], MinLen(1)] | None = None
    """Block options of the new stack, one map per block. null: the kind of its neighbour."""


class StageSettings(Settings):
    """One leg of a run: what grows, what trains, for how long."""

    train: Annotated[list[Text], MinLen(1)]
    """What trains: all, new, trunk, embedding, tail, norm, head, stack:<position>, block:<position>.<i>, lora:<set>."""
    name: Text | None = None
    """What reports call it. null: its number."""
    n_stacks: Depth | None = None
    """Stacks while it trains. null: those of the stage before and what grows; in the first stage 1 where a later stage grows, else all."""
    grow: GrowthSettings | None = None
    """What is added first. null: nothing."""
    max_steps: PositiveInt | None = None
    """Budget in optimizer steps. null: another of the three budgets, of which a stage has exactly one."""
    max_tokens: PositiveInt | None = None
    """Budget in tokens. null: another budget."""
    epochs: PositiveInt | None = None
    """Budget in passes over the training data. null: another budget."""
    lr: PositiveFloat | None = None
    """Peak learning rate of the newest stack. null: `optimizer.lr`."""
    trunk_lr: PositiveFloat | None = None
    """Peak learning rate of the other stacks. null: `optimizer.lr`."""
    io_lr: PositiveFloat | None = None
    """Peak learning rate of embedding, tail, norm and head. null: `optimizer.lr`."""
    adapter_lr: PositiveFloat | None = None
    """Peak learning rate of adapters. null: `training.progressive.qlora_lr`."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises."""
    schedule: Annotated[list[NonNegativeInt], MinLen(2), MaxLen(2)] | None = None
    """[start, total]: the learning rate follows a schedule of `total` steps from step `start` on, which several stages may share. null: a schedule of its own."""
    optimizer_state: StateChange = "reset"
    """Moments at the start, as in `training.progressive.growth_optimizer`."""
    alone: NonNegativeInt | None = None
    """Run the embedding, only the stack with this build index, norm and head. null: the whole rack."""
    data_start: NonNegativeInt | None = None
    """Optimizer steps into the training data at which it starts. null: where the last stage ended."""
    seq_len: PositiveInt | None = None
    """Tokens per row. null: `training.seq_len`."""
    batch_size: PositiveInt | None = None
    """Rows per micro-batch. null: `training.batch_size`."""
    precision: StackPrecision | None = None
    """Precision of the stacks that join here, as in `training.progressive.new_stack_precision`. null: that key."""
    noise: Annotated[list[UnitFloat], MinLen(2), MaxLen(2)] | None = None
    """[lo, hi]: range of the share of corrupted tokens that it trains on. null: that of the objective."""
    eval_noise: Annotated[list[UnitFloat], MinLen(2), MaxLen(2)] | None = None
    """[lo, hi]: range that held-out text is scored on after it. null: `noise`."""
    cache: Literal["auto"] | Flag | None = None
    """Keep the outputs of its frozen trunk, as in `training.progressive.cache_activations`; true is refused where it is not allowed. null: that key."""


class CurriculumKeys(Settings):
    """What grows, what trains, for how long."""

    enabled: Flag = True
    """Train stack by stack. false: one end-to-end stage."""
    building_mode: Literal["append", "prepend", "grow", "independent", "cyclic"] = "append"
    """append puts each new stack next to the head; prepend next to the embedding; grow trains a small rack and then repeats its stacks; independent trains each stack alone between embedding and head; cyclic has all stacks from the start and trains one at a time in turn."""
    max_stacks: PositiveInt = 12
    """The builder refuses to grow beyond this many stacks."""
    target_stacks: PositiveInt | None = None
    """Stacks the run ends with. null: `model.architecture.n_stacks`."""
    training_objective: Literal["clm", "mlm", "diffusion", "custom"] = "clm"
    """What is learned. clm: the next token, which needs causal attention; mlm: hidden tokens of a row; diffusion: hidden tokens at every share of hidden ones, up to all; custom: targets that come with the batch."""
    trunk_strategy: Literal["frozen", "qlora", "trainable"] = "frozen"
    """Older stacks under append and prepend: frozen, no gradient and no optimizer state; qlora, only their adapters train; trainable, they train on at `training.trunk_lr`."""
    new_stack_init: Start = "copy"
    """Start of a new stack: copy of the nearest trained one; zero, the copy with its output projections at zero, which leaves the logits unchanged; random."""
    consistency_weight: NonNegativeFloat = 0.0
    """Under prepend, the weight of the squared distance between what a new stack gives and the embedding under the noise on which the stacks behind it trained, both at unit rms; 0 is off, about 0.1 is usual. The loss that is logged includes it."""
    train_head: Trains = "auto"
    """When head and final norm train: always, in the first stage and the joint phase only (first), never. auto: first under prepend and independent, in their visits under cyclic, else always."""
    train_embedding: Trains = "auto"
    """When the embedding trains: always, in the first stage and the joint phase only (first), never. auto: first under append, prepend and independent, in its visits under cyclic, else always."""
    global_head_blocks: NonNegativeInt = 1
    """Blocks between the newest stack and the final norm that train at every stage of an append run; 0 is off."""
    joint_tuning: Literal["auto"] | Flag = "auto"
    """Train everything together after the last stage. auto: on under append."""
    joint_tuning_fraction: Share = 0.25
    """Share of the run's FLOPs that the joint phase takes."""
    joint_tuning_backbone: Literal["trainable", "gradual", "qlora", "frozen"] = "trainable"
    """What trains in the joint phase: trainable, all; gradual, stacks thaw from the head down in equal shares; qlora, adapters and head; frozen, newest stack, norm and head."""
    joint_lr: PositiveFloat | None = None
    """Peak learning rate of the joint phase. null: `training.trunk_lr` for the older stacks, `optimizer.lr` for the rest."""
    growth_factor: Annotated[Int, Ge(2), Le(4)] | None = None
    """How many times more stacks the rack has at the end of grow than at its start. null: 4 from 8 blocks up, else 2, or the next number that divides the stacks."""
    growth_at: Share = 0.15
    """Share of the tokens of grow that are trained before the rack has its full depth."""
    growth_pattern: Literal["whole", "middle", "last"] = "whole"
    """whole repeats the whole sequence of stacks at once; middle inserts copies of the middle stack, one after the other; last puts copies of the last stack next to the head, one after the other."""
    growth_schedule: Literal["shared", "own"] = "shared"
    """Learning rate of grow: one schedule runs over all depths (shared), so that a small rack is not trained to the end before it grows, or every depth has its own."""
    growth_layers: Annotated[list[NonNegativeInt], MinLen(1)] | None = None
    """Explicit map for grow: block i of the full rack starts as block `growth_layers[i]` of the small one. null: by `growth_pattern`."""
    growth_optimizer: StateChange = "reset"
    """Optimizer state at a stage change: reset drops it, carry gives each parameter what it had when it last trained, copy also starts new blocks with that of the blocks they copy."""
    rewarmup_fraction: UnitFloat = 0.01
    """Share of a stage's steps over which the learning rate rises again after a stage change."""
    cycle_sweeps: PositiveInt = 2
    """How often cyclic visits every unit."""
    cycle_steps: PositiveInt | None = None
    """Optimizer steps of one visit. null: equal visits, and as many steps in all as the stacks of an append run have."""
    cycle_order: Literal["forward", "backward", "random"] = "forward"
    """Order of the stacks in a sweep, from the embedding or from the head; random is drawn for every sweep and takes embedding and head, otherwise the first, along."""
    train_stacks: Annotated[list[NonNegativeInt], MinLen(1)] | None = None
    """Positions of the stacks that independent trains here, in this order; `stackwise merge` unites runs. null: all."""
    independent_io: Literal["auto", "own", "shared"] = "auto"
    """Embedding, norm and head under independent. shared: all stacks use those that the stack next to the head trains; own: each other stack trains a copy, which is a part of it. auto: own where time is depth and no joint phase follows, else shared."""
    shared_start_fraction: BelowOne = 0.0
    """Under independent, the share of the run's steps in which one stack first trains on everything, with embedding, norm and head; every stack then starts as a copy of it. 0 is off. With `checkpoint.init_from`, a run of one stack, that has happened there."""
    stage_weights: Annotated[list[PositiveFloat], MinLen(1)] | None = None
    """Relative budgets of the stack stages in build order, one number per stack. null: equal."""


class ProgressiveSettings(TimeKeys, TrunkKeys, AdapterKeys, PrecisionKeys, CurriculumKeys):
    """Growth of the model, stack by stack."""
