"""One optimizer step: batches -> loss -> gradients -> new weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.stage import Stage
from stackwise.model.init import keyed_generator
from stackwise.model.rack import Rack
from stackwise.objectives.base import Example, Objective
from stackwise.training.balance import Balance
from stackwise.training.consistency import Aim, distance
from stackwise.training.counting import StepBytes
from stackwise.training.device import computing_in
from stackwise.training.errors import NumericError
from stackwise.training.hooks import Hooks, Loader
from stackwise.training.optim import Optimizers
from stackwise.training.progress import Progress
from stackwise.training.schedule import stage_factor
from stackwise.training.stage_setup import StageSetup


class Stepping:
    """The part of the engine that takes a step. What it works on is made by the engine, stage by stage."""

    config: StackWiseConfig
    rack: Rack
    loader: Loader
    objective: Objective
    device: torch.device
    dtype: torch.dtype
    hooks: Hooks
    progress: Progress
    setup: StageSetup | None
    optimizers: Optimizers | None
    scaler: torch.amp.GradScaler
    scaling: bool
    """Whether the loss is scaled in this stage."""
    lr: float
    grad_norm: float
    balance: Balance
    _batches: Iterator[Mapping[str, Tensor]]
    _rows_per_chunk: int | None
    _has_dropout: bool
    _saved_step: int

    def _train_step(self, stage: Stage) -> None:
        training, p, optimizers = self.config.training, self.progress, self.optimizers
        assert optimizers is not None
        started = time.perf_counter()
        # What a step draws at random depends on its place in the data, so that stages which restart there repeat.
        draw = p.step if stage.data_start is None else stage.data_start + p.stage_step
        self.lr = optimizers.set_factor(stage_factor(stage, p.stage_step, training), draw)
        self.rack.follow_weights()
        batches = [next(self._batches) for _ in range(training.gradient_accumulation_steps)]
        examples = [self.objective.corrupt(batch, stage.noise).to(self.device) for batch in batches]
        # One divisor for the whole step, so that the loss does not depend on how it is cut into micro-batches.
        weight = torch.stack([self.objective.weight(example) for example in examples]).sum().clamp_min(1)
        aims = self._aims(batches, weight)
        self.balance = Balance(self.rack, examples, self.scaler if self.scaling else None)
        total = torch.zeros((), device=self.device)
        counted = StepBytes(self.rack) if p.stage_step == 0 else None
        with nullcontext() if counted is None else counted.counting():
            for index, example in enumerate(examples):
                if self._has_dropout:
                    key = (draw, index)
                    torch.manual_seed(keyed_generator(training.seed, "dropout", *key).initial_seed())
                loss = self._loss(example, aims[index] if aims else None) / weight
                self._read_ahead(stage, batches[index + 1 :])
                with optimizers.in_backward():
                    (self.scaler.scale(loss) if self.scaling else loss).backward()
                total += loss.detach()
        if self.scaling:
            for optimizer in optimizers.optimizers:
                self.scaler.unscale_(optimizer)
        norm = optimizers.gradient_norm()
        loss_value, norm_value = torch.stack((total, norm.to(total))).tolist()
        p.stage_step += 1
        p.step += 1
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            limit = training.max_grad_norm or math.inf
            if norm_value > limit:
                optimizers.clip(limit, norm)
            self._apply(optimizers)
            self.balance.settle()
            self._note_loss(loss_value)
        else:
            self._not_finite(stage, loss_value, norm_value)
        if counted is not None:
            p.bytes = counted.result(optimizers)
        optimizers.zero_grad()
        self.grad_norm = norm_value
        tokens = sum(example.input_ids.numel() for example in examples)
        self._note_cost(tokens, time.perf_counter() - started)

    def _read_ahead(self, stage: Stage, rest: list[Mapping[str, Tensor]]) -> None:
        """Begin to read the stored outputs of the next micro-batch, while gradients of this one are computed."""
        assert self.setup is not None
        if self.setup.prefix is not None and (rest or self.progress.stage_step + 1 < stage.steps):
            self.setup.read_ahead(rest[0] if rest else self.loader.upcoming())  # type: ignore[attr-defined]

    def _aims(self, batches: list[Mapping[str, Tensor]], weight: Tensor) -> list[Aim]:
        """What the output of a prepended stack is held to, by micro-batch; empty where there is no such thing."""
        held = None if self.setup is None else self.setup.consistency
        return [] if held is None else held.aims(self.objective, batches, weight, self.device)

    def _loss(self, example: Example, aim: Aim | None = None) -> Tensor:
        """Summed loss of one micro-batch."""
        assert self.setup is not None
        with computing_in(self.dtype, self.device), self.balance.listening():
            if aim is None:
                new, hidden = None, self.setup.forward(example)
            else:
                new, hidden = self.setup.forward_past(example)
            loss = self.objective.loss(hidden, self.rack.io.head, example, self._rows_per_chunk)[0]
            if aim is None or new is None:
                return loss
            return loss + aim.factor * distance(self.rack, self.objective, new, aim.lighter)

    def _apply(self, optimizers: Optimizers) -> None:
        if not self.scaling:
            optimizers.step()
            return
        for optimizer in optimizers.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def _not_finite(self, stage: Stage, loss: float, norm: float) -> None:
        """Stop or skip; in either case the step changes nothing."""
        assert self.optimizers is not None
        p = self.progress
        self.optimizers.zero_grad()
        if self.scaling:
            self.scaler.update()
        what = f"loss {loss}, gradient norm {norm}"
        where = f"step {p.step}, stage {p.stage + 1} ({stage.name}), learning rate {self.lr:.3g}"
        if self.config.training.on_nonfinite == "skip" or self.scaling:
            p.skipped += 1
            self.hooks.emit({"event": "note", "message": f"skipped {where}: {what} ({p.skipped} so far)"})
            return
        intact = f"The commit of step {self._saved_step} is intact; " if self._saved_step >= 0 else ""
        raise NumericError(
            f"not finite at {where}: {what}. {intact}lower training.optimizer.lr, raise "
            "training.warmup_steps, or set training.on_nonfinite=skip"
        )

    def _note_loss(self, loss: float) -> None:
        p = self.progress
        p.loss_first = loss if p.loss_first is None else p.loss_first
        p.loss_last = loss
        p.loss_sum += loss
        p.loss_count += 1

    def _note_cost(self, tokens: int, seconds: float) -> None:
        assert self.setup is not None
        p, flops = self.progress, self.setup.flops_per_token * tokens + self.setup.prefix_flops()
        p.tokens, p.stage_tokens = p.tokens + tokens, p.stage_tokens + tokens
        p.flops, p.stage_flops = p.flops + flops, p.stage_flops + flops
        p.seconds, p.stage_seconds = p.seconds + seconds, p.stage_seconds + seconds
