"""ProgressiveTrainer: the same engine for racks and data loaders of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from stackwise.config.notes import tunes_jointly
from stackwise.config.root import StackWiseConfig
from stackwise.config.rules import stacks_at_the_end
from stackwise.curriculum.builder import ProgressiveRackBuilder
from stackwise.curriculum.curricula import append, joint_stage, stage_steps
from stackwise.curriculum.stage import Growth, Stage
from stackwise.model.rack import Rack
from stackwise.tracking.events import Sink, Tracker
from stackwise.training.device import pick_device, pick_dtype
from stackwise.training.loop import Engine, Hooks
from stackwise.training.progressive_data import as_dict
from stackwise.training.validate import validate


class CyclingLoader:
    """An endless stream over a finite loader of dict or tuple batches; its position is (epoch, batch).

    A tuple is read as (input_ids, attention_mask). Resuming skips batches already seen, which is exact when the
    loader gives the same batches in every pass.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.epoch = self.index = 0

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        skip = self.index
        while True:
            empty = True
            for i, batch in enumerate(self.batches):
                empty = False
                if i < skip:
                    continue
                self.index = i + 1
                yield as_mapping(batch)
            if empty:
                raise ValueError("the data loader gives no batches")
            skip, self.index, self.epoch = 0, 0, self.epoch + 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]


def as_mapping(batch: Any) -> Mapping[str, Tensor]:
    """The tensors of a dict or tuple batch by name."""
    return {key: value for key, value in as_dict(batch).items() if isinstance(value, Tensor)}


class ProgressiveTrainer:
    """Trains a builder's rack on your own data loader, stage by stage.

    `sinks` receive the run's events (`stackwise.tracking.events`); none: silent.
    """

    def __init__(self, config: StackWiseConfig, sinks: list[Sink] | None = None) -> None:
        config.validate()
        self.config = config
        self.sinks = sinks or []
        self._trained: set[tuple[int, str]] = set()

    def train_progressively(
        self,
        rack_builder: ProgressiveRackBuilder,
        dataloader: Iterable[Any],
        target_stacks: int | None = None,
        eval_dataloader: Iterable[Any] | None = None,
    ) -> dict[str, Any]:
        """Grow to `target_stacks` (null: the config's number), one stage per stack, then the joint phase if it is on.

        Stacks already there are kept; those this trainer has not trained come first, in build order. A target below
        what is there: ValueError. Calling again with the same target adds nothing.
        """
        target = stacks_at_the_end(self.config) if target_stacks is None else target_stacks
        if target < rack_builder.n_stacks:
            raise ValueError(
                f"target_stacks is {target}, but the rack already has {rack_builder.n_stacks} stacks"
            )
        if target > rack_builder.max_stacks:
            raise ValueError(
                f"target_stacks is {target}, but training.progressive.max_stacks is {rack_builder.max_stacks}"
            )
        if rack_builder.n_stacks == 0 and target:
            rack_builder.append_stack()
        stages = self._stages(rack_builder, target, dataloader)
        return self._run(rack_builder, stages, dataloader, eval_dataloader)

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
        steps = stage_steps(self.config, _passes(dataloader, self.config))
        stage = Stage("joint", count, ("all",), steps, trunk_lr=self.config.training.trunk_lr)
        return self._run(rack_builder, [stage], dataloader, eval_dataloader)

    def _stages(self, builder: ProgressiveRackBuilder, target: int, dataloader: Iterable[Any]) -> list[Stage]:
        steps = stage_steps(self.config, _passes(dataloader, self.config))
        progressive = self.config.training.progressive.model_copy(update={"target_stacks": target})
        training = self.config.training.model_copy(update={"progressive": progressive})
        config = self.config.model_copy(update={"training": training})
        templates = append(config, steps)[:target]
        rack = builder.build_rack()
        ordered = sorted(rack.stacks, key=lambda stack: stack.build_index)
        stages = []
        for k, template in enumerate(templates):
            if k >= len(ordered):
                # A builder may hold stacks of its own making, so growth is said here, not by the template.
                blocks = self.config.model.architecture.blocks_per_stack
                grow = Growth("append", blocks, progressive.new_stack_init)
                stages.append(replace(template, grow=grow))
            elif self._key(builder, ordered[k].uid) not in self._trained:
                trains = tuple(
                    f"stack:{ordered[k].stack_id}" if name == "new" else name for name in template.trains
                )
                stages.append(replace(template, n_stacks=len(ordered), trains=trains, grow=None))
        if stages and tunes_jointly(config):
            stages.append(joint_stage(config, stages))
        return stages

    def _run(
        self,
        builder: ProgressiveRackBuilder,
        stages: list[Stage],
        dataloader: Iterable[Any],
        eval_dataloader: Iterable[Any] | None,
    ) -> dict[str, Any]:
        device = pick_device(self.config.training.device)
        dtype = pick_dtype(self.config.training.dtype, device)

        def evaluate(rack: Rack) -> dict[str, Any]:
            assert eval_dataloader is not None
            total, count = validate(rack, map(as_mapping, eval_dataloader), dtype=dtype)
            if count == 0:
                raise ValueError("the evaluation data has no targets")
            return {"loss": total / count}

        with Tracker(self.sinks) as tracker:
            hooks = Hooks(emit=tracker.emit, evaluate=None if eval_dataloader is None else evaluate)
            engine = Engine(
                self.config,
                builder.build_rack(),
                stages,
                CyclingLoader(dataloader),
                device=device,
                dtype=dtype,
                hooks=hooks,
            )
            try:
                history = engine.run()
            finally:
                builder.replace_rack(engine.rack)
        rack = builder.build_rack()
        self._trained |= {self._key(builder, stack.uid) for stack in rack.stacks} if stages else set()
        records = [self._record(rack, entry) for entry in history]
        return {
            "training_history": [r for r in records if r["name"] != "joint"],
            "joint_tuning": next((r for r in records if r["name"] == "joint"), None),
            "final_loss": engine.progress.loss_last,
            "eval_loss": engine.progress.eval_loss,
            "final_rack_info": builder.get_rack_info(),
            "total_training_time": engine.progress.seconds,
            "architecture": {
                "n_stacks": len(rack.stacks),
                "blocks_per_stack": [len(stack.blocks) for stack in rack.stacks],
                "total_blocks": len(rack.spec.blocks),
                "params": rack.get_parameter_count(),
                "trainable": rack.get_trainable_parameter_count(),
            },
        }

    @staticmethod
    def _key(builder: ProgressiveRackBuilder, uid: str) -> tuple[int, str]:
        return id(builder), uid

    @staticmethod
    def _record(rack: Rack, entry: dict[str, Any]) -> dict[str, Any]:
        """A history entry with the identity of the stack it was about."""
        trained = [t.removeprefix("stack:") for t in entry["trains"] if t.startswith("stack:")]
        newest = max((s for s in rack.stacks if s.uid in trained), key=lambda s: s.build_index, default=None)
        return {
            **entry,
            "stack_uid": newest.uid if newest else None,
            "position": newest.stack_id if newest else None,
            "build_index": newest.build_index if newest else None,
        }


def _passes(dataloader: Iterable[Any], config: StackWiseConfig) -> int | None:
    """Optimizer steps of one pass over a loader, or null when it has no length."""
    try:
        count = len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None
    return math.ceil(count / config.training.gradient_accumulation_steps)
