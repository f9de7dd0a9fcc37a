"""Moments of parameters that rest: they wait in main memory for the stage in which their parameter trains again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stackwise.curriculum.split import trained_units, units_of
from stackwise.curriculum.stage import Stage
from stackwise.model.names import adapter_set_of
from stackwise.model.spec import RackSpec
from stackwise.training.optim import OptimizerState


def resting(
    moments: OptimizerState, training: Collection[str], later: Sequence[Stage], specs: Sequence[RackSpec]
) -> OptimizerState:
    """Of `moments` those to keep, in main memory. `training`: names of the parameters that train now.

    Kept are those of parameters that do not train now and whose next stage carries moments on; what the next stage
    resets, or no stage trains, is dropped. `specs`: the rack that each of the `later` stages trains.
    """
    units = [trained_units(spec, stage) for stage, spec in zip(later, specs, strict=True)]

    def goes_on(name: str) -> bool:
        own = units_of(name, adapter_set_of(name))
        following = (stage for stage, trained in zip(later, units, strict=True) if own & trained)
        stage = next(following, None)
        return stage is not None and stage.optimizer_state != "reset"

    return {
        name: {key: value.cpu() for key, value in held.items()}
        for name, held in moments.items()
        if name not in training and goes_on(name)
    }
