"""The same engine for racks and data loaders of one's own: ProgressiveTrainer and ArchitectureTrainer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.objective_rules import label_of, masks, scored_share
from stackwise.config.root import StackWiseConfig
from stackwise.config.rules import stacks_at_the_end
from stackwise.curriculum.builder import ProgressiveRackBuilder
from stackwise.curriculum.curricula import stage_steps
from stackwise.curriculum.present import by_unit, stacks_at_the_start, stages_from, with_target
from stackwise.curriculum.program import hand_written
from stackwise.curriculum.stage import Stage
from stackwise.model.rack import Rack
from stackwise.objectives.base import Noise, Objective
from stackwise.objectives.build import objective_of
from stackwise.objectives.depth import stack_noise
from stackwise.tracking.events import Sink, Tracker
from stackwise.training.cycling import CyclingLoader, as_mapping
from stackwise.training.device import pick_device, pick_dtype
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine
from stackwise.training.validate import validate


class _Trainer:
    """`sinks` receive the run's events (`stackwise.tracking.events`); none: silent."""

    def __init__(self, config: StackWiseConfig, sinks: list[Sink] | None = None) -> None:
        config.validate()
        self.config = config
        self.sinks = sinks or []

    def _steps(self, dataloader: Iterable[Any]) -> int:
        """Optimizer steps of one stack."""
        return stage_steps(self.config, _passes(dataloader, self.config))

    def _engine(
        self,
        config: StackWiseConfig,
        rack: Rack,
        stages: list[Stage],
        dataloader: Iterable[Any],
        eval_dataloader: Iterable[Any] | None,
        tracker: Tracker,
    ) -> Engine:
        device = pick_device(config.training.device)
        dtype = pick_dtype(config.training.dtype, device)

        objective = _objective(config, rack)
        passes = config.evaluation.passes if masks(config) else 1

        def evaluate(rack: Rack, noise: Noise | None = None) -> dict[str, Any]:
            assert eval_dataloader is not None
            batches = [as_mapping(batch) for batch in eval_dataloader]
            total, count = validate(
                rack, batches, objective=objective, passes=passes, noise=noise, dtype=dtype
            )
            return {"loss": total / count, "label": label_of(config, noise)}

        hooks = Hooks(emit=tracker.emit, evaluate=None if eval_dataloader is None else evaluate)
        loader = CyclingLoader(dataloader)
        return Engine(
            config, rack, stages, loader, device=device, dtype=dtype, hooks=hooks, objective=objective
        )


class ProgressiveTrainer(_Trainer):
    """Trains a builder's rack on your own data loader, stage by stage.

    `sinks` receive the run's events (`stackwise.tracking.events`); none: silent.
    """

    def __init__(self, config: StackWiseConfig, sinks: list[Sink] | None = None) -> None:
        super().__init__(config, sinks)
        self._trained: set[tuple[int, str]] = set()

    def train_progressively(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        eval_dataloader: Iterable[Any] | None = None,
    ) -> dict[str, Any]:
        """Grow to `target_stacks` (null: the config's number) as the builder's `building_mode` says.

        Stacks already there are kept; those this trainer has not trained come first, in build order. The joint phase
        follows where the config has one. A target below what is there, or a number of stacks that the mode cannot
        grow from: ValueError. Calling again with the same target adds nothing. With `training.stages` these run.
        """
        builder, target = rack_builder, target_stacks
        if target is None:
            target = stacks_at_the_end(self.config)
        if target < builder.n_stacks:
            raise ValueError(f"target_stacks is {target}, but the rack already has {builder.n_stacks} stacks")
        if target > builder.max_stacks:
            raise ValueError(
                f"target_stacks is {target}, but training.progressive.max_stacks is {builder.max_stacks}"
            )
        if self.config.training.stages is not None:
            stages = hand_written(self.config, _passes(dataloader, self.config))
            builder.fill(stages[0].n_stacks)
            return self._run(self.config, builder, stages, dataloader, eval_dataloader)
        config = with_target(self.config, builder.building_mode, target, builder.n_stacks)
        config.validate()
        builder.fill(stacks_at_the_start(config))
        spec = builder.build_rack().spec
        trained = {stack.uid for stack in spec.stacks if (id(builder), stack.uid) in self._trained}
        stages = stages_from(config, spec, trained, self._steps(dataloader))
        return self._run(config, builder, stages, dataloader, eval_dataloader)

    def train_rack(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        eval_dataloader: Iterable[Any] | None = None,
    ) -> dict[str, Any]:
        """With a target, `train_progressively`; without one, tune the present rack jointly for one stage's budget."""
        if target_stacks is not None:
            return self.train_progressively(rack_builder, dataloader, target_stacks, eval_dataloader)
        count = len(rack_builder.build_rack().stacks)
        rate = self.config.training.trunk_lr
        stage = Stage("joint", count, ("all",), self._steps(dataloader), trunk_lr=rate)
        return self._run(self.config, rack_builder, [stage], dataloader, eval_dataloader)

    def _run(
        self,
        config: StackWiseConfig,
        builder: ProgressiveRackBuilder,
        stages: list[Stage],
        dataloader: Iterable[Any],
        eval_dataloader: Iterable[Any] | None,
    ) -> dict[str, Any]:
        with Tracker(self.sinks) as tracker:
            rack = builder.build_rack()
            engine = self._engine(config, rack, stages, dataloader, eval_dataloader, tracker)
            try:
                engine.run()
            finally:
                builder.replace_rack(engine.rack)
        if stages:
            self._trained |= {(id(builder), stack.uid) for stack in engine.rack.stacks}
        return {**_results(engine), "final_rack_info": builder.get_rack_info()}


class ArchitectureTrainer(_Trainer):
    """Trains a finished rack on your own data loader, piece by piece as `training.unit` says.

    `sinks` receive the run's events (`stackwise.tracking.events`); none: silent.
    """

    def train_architecture(
        self, rack: Rack, dataloader: Iterable[Any], eval_dataloader: Iterable[Any] | None = None
    ) -> dict[str, Any]:
        """One stage per block or stack from the embedding on, or one for the whole rack; norm and head train along.

        The rack is trained in place. Every stage has the budget of `training.max_steps`, or of
        `training.epochs_per_stack` passes over the loader.
        """
        stages = by_unit(self.config, rack.spec, self._steps(dataloader))
        with Tracker(self.sinks) as tracker:
            engine = self._engine(self.config, rack, stages, dataloader, eval_dataloader, tracker)
            engine.run()
        return _results(engine)


def _objective(config: StackWiseConfig, rack: Rack) -> Objective:
    """The objective for a rack of one's own, which has a vocabulary but no tokenizer."""
    size = rack.spec.vocab_size
    if masks(config) and config.objective.mask_token_id is None:
        message = "is null, and a rack of your own has no tokenizer to take it from"
        raise ConfigError(Problem("objective.mask_token_id", message, None, f"0 to {size - 1}"))
    model = config.model.model_copy(update={"vocab_size": size})
    return objective_of(config.model_copy(update={"model": model}))


def _results(engine: Engine) -> dict[str, Any]:
    rack, p = engine.rack, engine.progress
    records = [_record(engine, entry) for entry in p.history]
    joint = [record for record in records if record["name"].startswith("joint")]
    return {
        "training_history": [record for record in records if record not in joint],
        "joint_tuning": joint[-1] if joint else None,
        "final_loss": p.loss_last,
        "eval_loss": p.eval_loss,
        "total_training_time": p.seconds,
        "checkpoints": [],  # a rack of one's own has no run folder
        "architecture": {
            "n_stacks": len(rack.stacks),
            "blocks_per_stack": [len(stack.blocks) for stack in rack.stacks],
            "total_blocks": len(rack.spec.blocks),
            "params": rack.get_parameter_count(),
            "trainable": rack.get_trainable_parameter_count(),
        },
    }


def _record(engine: Engine, entry: dict[str, Any]) -> dict[str, Any]:
    """A history entry with the identity of the stack it was about; where all train, the one built last.

    `time_step`: the first one that the stack owns where time is depth. `mask_ratio`: mean share of hidden tokens.
    """
    rack, config = engine.rack, engine.config
    trained = {unit.partition(":")[2].partition(".")[0] for unit in entry["trains"] if ":" in unit}
    stack = max((s for s in rack.stacks if s.uid in trained), key=lambda s: s.build_index, default=None)
    noise, time_step, count = engine.stages[entry["stage"]].scored_noise, None, len(rack.stacks)
    if noise is not None and stack is not None and config.training.stages is None:
        time_step = stack_noise(config, count).starts[count - 1 - stack.stack_id]
    return {
        **entry,
        "stack_uid": stack.uid if stack else None,
        "position": stack.stack_id if stack else None,
        "build_index": stack.build_index if stack else None,
        "precision": stack.compute_dtype or "full" if stack else None,
        "time_step": time_step,
        "mask_ratio": scored_share(config, noise) if masks(config) else 0.0,
    }


def _passes(dataloader: Iterable[Any], config: StackWiseConfig) -> int | None:
    """Optimizer steps of one pass over a loader, or null when it has no length."""
    try:
        count = len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None
    return math.ceil(count / config.training.gradient_accumulation_steps)
