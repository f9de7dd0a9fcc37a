"""Settings of the progressive run: what grows, what trains, and how a new stack starts."""

from typing import Annotated, Literal

from annotated_types import MinLen

from stackwise.adapters.settings import AdapterKeys
from stackwise.config.base import Settings
from stackwise.config.types import Flag, NonNegativeInt, PositiveFloat, PositiveInt, Share, UnitFloat
from stackwise.precision.settings import PrecisionKeys
from stackwise.trunk.settings import TrunkKeys

Trains = Literal["auto", "always", "first", "never"]


class CurriculumKeys(Settings):
    """What grows, what trains, for how long."""

    enabled: Flag = True
    """Train stack by stack. false: one end-to-end stage."""
    building_mode: Literal["append"] = "append"
    """Where a new stack goes: append puts it next to the head."""
    max_stacks: PositiveInt = 12
    """The builder refuses to grow beyond this many stacks."""
    target_stacks: PositiveInt | None = None
    """Stacks the run ends with. null: `model.architecture.n_stacks`."""
    training_objective: Literal["clm"] = "clm"
    """What is learned: clm predicts the next token and needs causal attention."""
    trunk_strategy: Literal["frozen", "trainable"] = "frozen"
    """Older stacks stay as they are (frozen, no gradient and no optimizer state) or train on at `training.trunk_lr`."""
    new_stack_init: Literal["copy", "zero", "random"] = "copy"
    """Start of a new stack: copy of the newest trained one; zero, the copy with its output projections at zero, which leaves the logits unchanged; random."""
    train_head: Trains = "auto"
    """When head and final norm train: always, in the first stage and the joint phase only (first), never. auto: always."""
    train_embedding: Trains = "auto"
    """When the embedding trains: always, in the first stage and the joint phase only (first), never. auto: first under append, always end to end."""
    global_head_blocks: NonNegativeInt = 1
    """Blocks between the newest stack and the final norm that train at every stage; 0 is off."""
    joint_tuning: Literal["auto"] | Flag = "auto"
    """Train everything together after the last growth. auto: on under append."""
    joint_tuning_fraction: Share = 0.25
    """Share of the run's FLOPs that the joint phase takes."""
    growth_optimizer: Literal["reset", "carry", "copy"] = "reset"
    """Optimizer state at a stage change: reset drops it, carry keeps that of the tensors that go on training, copy also starts the new stack with its source's."""
    rewarmup_fraction: UnitFloat = 0.01
    """Share of a stage's steps over which the learning rate rises again after growth."""
    stage_weights: Annotated[list[PositiveFloat], MinLen(1)] | None = None
    """Relative budgets of the stack stages, one number per stack. null: equal."""


class ProgressiveSettings(TrunkKeys, AdapterKeys, PrecisionKeys, CurriculumKeys):
    """Growth of the model, stack by stack."""
