"""What the frontier compares: every curriculum as a change of config, and the controls it must beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from frontier_budget import Keys

Group = Literal["reference", "stack-wise", "growth", "control"]
P = "training.progressive."


@dataclass(frozen=True)
class Variant:
    """`keys` change the base config. `share` of end to end's FLOPs is its budget. `axes` it is run on.

    `steps_key`: where the budget goes. `big_batch`: as many steps as end to end, and FLOPs made equal by the batch.
    `text`: it is run on the text as well; one row of every kind is.
    """

    name: str
    group: Group
    says: str
    keys: Keys = field(default_factory=dict)
    axes: tuple[str, ...] = ("flops", "tokens")
    share: float = 1.0
    steps_key: str = "training.max_steps"
    big_batch: bool = False
    text: bool = True


def append_keys(**changes: Any) -> Keys:
    """Append without the global head block and the joint phase, which have rows of their own."""
    return {
        P + "enabled": True,
        P + "building_mode": "append",
        P + "global_head_blocks": 0,
        P + "joint_tuning": False,
        P + "cache_activations": False,
        **{P + key: value for key, value in changes.items()},
    }


def whole_keys(mode: str, **changes: Any) -> Keys:
    """Another curriculum, without a joint phase."""
    keys = {"enabled": True, "building_mode": mode, "joint_tuning": False, **changes}
    return {P + key: value for key, value in keys.items()}


END_TO_END = Variant("end to end", "reference", "all stacks from the first step on", {P + "enabled": False})


def variants(stacks: int) -> list[Variant]:
    """All rows of the table for a rack of `stacks` stacks of one block."""
    return [
        END_TO_END,
        Variant(
            "end to end, recomputed",
            "reference",
            "activations of the blocks computed again in the backward pass",
            {P + "enabled": False, "training.gradient_checkpointing": True},
            axes=("flops",),
            text=False,
        ),
        Variant(
            "end to end, streamed",
            "reference",
            "weights, gradients, moments and boundaries in host memory, one block at a time on the device",
            {P + "enabled": False, "training.residency": "streamed"},
            axes=("flops",),
        ),
        Variant(
            "append, random",
            "stack-wise",
            "frozen trunk, new stack at random",
            append_keys(new_stack_init="random"),
        ),
        Variant(
            "append",
            "stack-wise",
            "frozen trunk, new stack a copy of the last",
            append_keys(),
            axes=("flops",),
            text=False,
        ),
        Variant(
            "append, cached",
            "stack-wise",
            "the trunk's outputs read from the activation store",
            append_keys(cache_activations=True),
        ),
        Variant(
            "append, streamed, cached",
            "stack-wise",
            "the trunk in host memory as well",
            append_keys(cache_activations=True, trunk_residency="streamed"),
            axes=("flops",),
            text=False,
        ),
        Variant(
            "append, nf4 trunk",
            "stack-wise",
            "frozen stacks stored in 4 bits, outputs from the store",
            append_keys(cache_activations=True, trunk_precision="nf4"),
            axes=("flops",),
            text=False,
        ),
        Variant(
            "append, global head",
            "stack-wise",
            "one more block before the head that trains at every stage",
            append_keys(cache_activations=True, global_head_blocks=1),
            axes=("flops",),
        ),
        Variant(
            "append, joint phase",
            "stack-wise",
            "the last 20 % of the FLOPs train everything",
            append_keys(cache_activations=True, joint_tuning=True, joint_tuning_fraction=0.2),
        ),
        Variant(
            "append, gradual",
            "stack-wise",
            "the last 20 % of the FLOPs thaw the stacks from the head down",
            append_keys(
                cache_activations=True,
                joint_tuning=True,
                joint_tuning_fraction=0.2,
                joint_tuning_backbone="gradual",
            ),
            axes=("flops",),
            text=False,
        ),
        Variant(
            "prepend",
            "stack-wise",
            "new stack next to the embedding, gradient through the frozen ones",
            whole_keys("prepend"),
        ),
        Variant(
            "cyclic, reset",
            "stack-wise",
            "sweeps, one stack trains at a time, moments dropped",
            whole_keys("cyclic", cycle_sweeps=4),
            axes=("flops",),
            text=False,
        ),
        Variant(
            "cyclic, carried",
            "stack-wise",
            "sweeps, moments kept in host memory until the next visit",
            whole_keys("cyclic", cycle_sweeps=8, growth_optimizer="carry", trunk_residency="streamed"),
        ),
        Variant(
            "grow",
            "growth",
            "a quarter of the stacks for 15 % of the tokens, then four copies of them; each depth its own learning-rate schedule",
            whole_keys("grow", growth_factor=4, growth_at=0.15, growth_schedule="own"),
        ),
        Variant(
            "grow, 85 % FLOPs",
            "growth",
            "the same with 15 % fewer FLOPs",
            whole_keys("grow", growth_factor=4, growth_at=0.15, growth_schedule="own"),
            axes=("flops",),
            share=0.85,
            text=False,
        ),
        Variant(
            "grow, late",
            "growth",
            "growth at 25 % of the tokens",
            whole_keys("grow", growth_factor=4, growth_at=0.25, growth_schedule="own"),
            axes=("flops",),
            text=False,
        ),
        Variant(
            "grow, middle",
            "growth",
            "copies of the middle stack one by one during 40 % of the tokens",
            whole_keys(
                "grow", growth_pattern="middle", growth_factor=4, growth_at=0.4, growth_schedule="own"
            ),
            axes=("flops",),
            text=False,
        ),
        Variant(
            "grow, one by one, 85 % FLOPs",
            "growth",
            "copies of the last stack one by one during 54 % of the tokens, moments copied, one learning-rate schedule, "
            "15 % fewer FLOPs",
            one_by_one(),
            axes=("flops",),
            share=0.85,
        ),
        Variant(
            "grow, one by one",
            "growth",
            "the same with all FLOPs",
            one_by_one(),
            text=False,
        ),
        Variant(
            "grow, one by one, streamed",
            "growth",
            "the same with weights, gradients, moments and boundaries in host memory, one block at a time on the device",
            {**one_by_one(), "training.residency": "streamed"},
            axes=("flops",),
        ),
        Variant(
            "append, all train, 85 % FLOPs",
            "growth",
            "a copy of the last stack at a time, nothing frozen, moments carried and copied, 15 % fewer FLOPs",
            append_keys(trunk_strategy="trainable", train_embedding="always", growth_optimizer="copy"),
            axes=("flops",),
            share=0.85,
        ),
        *_shallow(1),
        *_shallow(2),
        Variant(
            "random trunk",
            "control",
            f"{stacks - 1} stacks stay at their random start, the last one and the head train",
            {
                P + "enabled": True,
                P + "cache_activations": False,
                "model.zero_init_outputs": False,
                "training.stages.0.train": [f"stack:{stacks - 1}", "norm", "head"],
                "training.stages.0.n_stacks": stacks,
            },
            axes=("flops",),
            steps_key="training.stages.0.max_steps",
        ),
    ]


def one_by_one() -> Keys:
    """Growth from a quarter of the stacks, one at a time."""
    keys = {"growth_factor": 4, "growth_pattern": "last", "growth_schedule": "shared", "growth_at": 0.54}
    return whole_keys("grow", growth_optimizer="copy", **keys)


def _shallow(blocks: int) -> list[Variant]:
    name = "1 block" if blocks == 1 else f"{blocks} blocks"
    keys = {P + "enabled": False, "model.architecture.n_stacks": blocks}
    return [
        Variant(name, "control", f"{name} for the whole budget: more steps", keys),
        Variant(
            f"{name}, larger batch",
            "control",
            f"{name} for the whole budget: as many steps, more rows in each",
            keys,
            axes=("flops",),
            big_batch=True,
            text=False,
        ),
    ]
