"""One optimizer step: batches -> loss -> gradients -> new weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.stage import Stage
from stackwise.model.init import keyed_generator
from stackwise.model.rack import Rack
from stackwise.objectives.base import Example, Objective
from stackwise.tracking import units
from stackwise.training.balance import Balance
from stackwise.training.consistency import Aim, distance
from stackwise.training.counting import StepBytes
from stackwise.training.device import computing_in
from stackwise.training.errors import GoBack, NumericError, OutOfMemory
from stackwise.training.finite import not_finite
from stackwise.training.guard import Guard, Verdict
from stackwise.training.hooks import Hooks, Loader
from stackwise.training.memory import advice, peak_bytes
from stackwise.training.optim import Optimizers
from stackwise.training.progress import Progress
from stackwise.training.schedule import stage_factor
from stackwise.training.stage_setup import StageSetup

LOWER = (
    "lower training.optimizer.lr, raise training.warmup_steps, or set training.on_nonfinite to skip or rollback "
    "(a run goes on with other settings by --allow-change)"
)
LOWEST_SCALE = 1.0
"""Of the loss in float16. Gradients that overflow even so are too large by themselves."""


@dataclass(frozen=True)
class _Found:
    """Loss and gradient norm of a step as numbers, and the norm as it is on the device."""

    loss: float
    norm: float
    norm_tensor: Tensor


class Stepping:
    """The part of the engine that takes a step. What it works on is made by the engine, stage by stage."""

    config: StackWiseConfig
    rack: Rack
    stages: list[Stage]
    loader: Loader
    objective: Objective
    device: torch.device
    dtype: torch.dtype
    hooks: Hooks
    progress: Progress
    guard: Guard
    setup: StageSetup | None
    optimizers: Optimizers | None
    scaler: torch.amp.GradScaler
    scaling: bool
    """Whether the loss is scaled in this stage."""
    lr: float = 0.0
    grad_norm: float = 0.0
    balance: Balance
    doing: str = "the setup"
    """What the run is at, for errors."""
    _batches: Iterator[Mapping[str, Tensor]]
    _rows_per_chunk: int | None
    _has_dropout: bool
    _saved_step: int

    def _train_step(self, stage: Stage) -> None:
        training, p, optimizers = self.config.training, self.progress, self.optimizers
        assert optimizers is not None
        started = time.perf_counter()
        self.doing = "the corruption"
        # What a step draws at random depends on its place in the data, so that stages which restart there repeat.
        draw = p.step if stage.data_start is None else stage.data_start + p.stage_step
        self.lr = optimizers.set_factor(stage_factor(stage, p.stage_step, training), draw)
        self.rack.follow_weights()
        batches = [next(self._batches) for _ in range(training.gradient_accumulation_steps)]
        examples = [self.objective.corrupt(batch, stage.noise).to(self.device) for batch in batches]
        # One divisor for the whole step, so that the loss does not depend on how it is cut into micro-batches.
        weight = torch.stack([self.objective.weight(example) for example in examples]).sum().clamp_min(1)
        aims = self._aims(batches, weight)
        counted = StepBytes(self.rack) if p.stage_step == 0 else None
        with nullcontext() if counted is None else counted.counting():
            found = self._gradients(stage, draw, batches, examples, aims, weight)
        verdict = self._judge(found)
        if verdict.why and training.recheck:
            optimizers.zero_grad()
            again = self._gradients(stage, draw, batches, examples, aims, weight)
            if repr((again.loss, again.norm)) != repr((found.loss, found.norm)):
                why = (
                    f"computed twice from the same weights and batch, the loss is {found.loss!r} and {again.loss!r}, "
                    f"the gradient norm {found.norm!r} and {again.norm!r}: the hardware is suspect"
                )
                verdict = Verdict("stop", why, hardware=True)
        p.stage_step += 1
        p.step += 1
        p.stage_batches += len(batches)
        if verdict.action == "apply":
            self.doing = "the optimizer's step"
            limit = training.max_grad_norm or math.inf
            if found.norm > limit:
                optimizers.clip(limit, found.norm_tensor)
            self._apply(optimizers)
            self.balance.settle()
            self._note_loss(found.loss)
            if verdict.why:
                self.hooks.emit({"event": "note", "message": f"{self._place(stage)}: {verdict.why}"})
        else:
            self._leave_out(stage, verdict, found, batches)
        if counted is not None:
            p.bytes = counted.result(optimizers)
        optimizers.zero_grad()
        self.grad_norm = found.norm
        tokens = sum(example.input_ids.numel() for example in examples)
        self._note_cost(tokens, time.perf_counter() - started)

    def _gradients(
        self,
        stage: Stage,
        draw: int,
        batches: list[Mapping[str, Tensor]],
        examples: list[Example],
        aims: list[Aim],
        weight: Tensor,
    ) -> _Found:
        """Forward and backward pass of all micro-batches."""
        optimizers = self.optimizers
        assert optimizers is not None
        self.balance = Balance(self.rack, examples, self.scaler if self.scaling else None)
        total = torch.zeros((), device=self.device)
        for index, example in enumerate(examples):
            if self._has_dropout:
                key = (draw, index)
                torch.manual_seed(keyed_generator(self.config.training.seed, "dropout", *key).initial_seed())
            self.doing = "the forward pass"
            loss = self._loss(example, aims[index] if aims else None) / weight
            self.doing = "the backward pass"
            self._read_ahead(stage, batches[index + 1 :])
            with optimizers.in_backward():
                (self.scaler.scale(loss) if self.scaling else loss).backward()
            total += loss.detach()
        if self.scaling:
            for optimizer in optimizers.optimizers:
                self.scaler.unscale_(optimizer)
        norm = optimizers.gradient_norm()
        loss_value, norm_value = torch.stack((total, norm.to(total))).tolist()
        return _Found(loss_value, norm_value, norm)

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

    def _judge(self, found: _Found) -> Verdict:
        """What to do with the step. Scaled gradients too large for float16 are part of finding their scale."""
        overflows = self.scaling and math.isfinite(found.loss) and not math.isfinite(found.norm)
        if overflows and (scale := self.scaler.get_scale()) > LOWEST_SCALE:
            return Verdict("skip", f"gradients overflow at a loss scale of {scale:g}")
        return self.guard.judge(self.progress.step + 1, found.loss, found.norm)

    def _leave_out(
        self, stage: Stage, verdict: Verdict, found: _Found, batches: list[Mapping[str, Tensor]]
    ) -> None:
        """Skip the step, go back or stop. In any case it changes nothing that is saved."""
        assert self.optimizers is not None
        facts = {} if verdict.action == "skip" else self._facts(stage, verdict, found, batches)
        self.optimizers.zero_grad()
        if self.scaling:
            self.scaler.update()
        if verdict.action != "skip":
            self._end(stage, verdict, facts)
        self.progress.skipped += 1
        message = f"skipped {self._place(stage)}: {verdict.why} ({self.progress.skipped} so far)"
        self.hooks.emit({"event": "note", "message": message})

    def refuse_what_is_not_finite(self) -> None:
        """Look at everything that has trained, before it is saved: a commit holds numbers only."""
        assert self.optimizers is not None
        named = {name: p for p, name in self.optimizers.names.items()}
        moments = {
            f"{moment} of {name}": tensor
            for name, held in self.optimizers.state().items()
            for moment, tensor in held.items()
        }
        if bad := not_finite([*named.items(), *moments.items()]):
            stage = self.stages[self.progress.stage]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            why = f"{bad[0]}{more} would be saved with numbers that are not finite"
            verdict = self.guard.refuse(self.progress.step, why)
            self._end(stage, verdict, self._facts(stage, verdict, None, []))

    def _end(self, stage: Stage, verdict: Verdict, facts: dict[str, Any]) -> NoReturn:
        """Go back, or stop."""
        what = f"{self._place(stage)}, learning rate {self.lr:.3g}: {verdict.why}"
        if verdict.action == "rollback":
            steps = self.config.training.rollback_steps if verdict.spike else 0
            raise GoBack(what, steps=steps, facts=facts)
        advice = "train on another machine, and have this one checked" if verdict.hardware else LOWER
        raise self.numeric_error(what, facts, advice)

    def numeric_error(self, what: str, facts: dict[str, Any], advice: str = LOWER) -> NumericError:
        """The error that ends the run, once the facts are written down."""
        kept = "" if self.hooks.failed is None else f"The facts are in {self.hooks.failed(facts)}. "
        intact = f"The commit of step {self._saved_step} is intact. " if self._saved_step >= 0 else ""
        return NumericError(f"stopped at {what}. {kept}{intact}To go on, {advice}.")

    def out_of_memory(self, stage: Stage, error: BaseException) -> OutOfMemory:
        """The error to end with. What the step has done by then is not saved by anybody."""
        p, training = self.progress, self.config.training
        step = p.step + (self.doing in ("the corruption", "the forward pass", "the backward pass"))
        rows, length = stage.batch_size or training.batch_size, stage.seq_len or training.seq_len
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        stored = f"The commit of step {self._saved_step}" if self._saved_step >= 0 else "Nothing"
        saving = self.doing == "the save"
        return OutOfMemory(
            f"out of memory in {self.doing} of step {step}, stage {p.stage + 1} ({stage.name}), with batches of "
            f"{rows} rows of {length} tokens: {first}. At most {units.size(peak_bytes(self.device))} were held. "
            f"{stored} is stored, and nothing of this step. Set {advice(self.config, stage, p.stage, saving)}"
        )

    def _place(self, stage: Stage) -> str:
        return f"step {self.progress.step}, stage {self.progress.stage + 1} ({stage.name})"

    def _facts(
        self, stage: Stage, verdict: Verdict, found: _Found | None, batches: list[Mapping[str, Tensor]]
    ) -> dict[str, Any]:
        """What is needed to compute the step again from the last commit, JSON-able. `found` null: after the step."""
        assert self.optimizers is not None
        p = self.progress
        grads = {name: q.grad for q, name in self.optimizers.names.items() if q.grad is not None}
        return {
            "step": p.step,
            "stage": p.stage,
            "stage_name": stage.name,
            "stage_step": p.stage_step,
            "why": verdict.why,
            "loss": None if found is None else repr(found.loss),
            "gradient_norm": None if found is None else repr(found.norm),
            "gradients_not_finite": not_finite(grads.items()),
            "weights_not_finite": not_finite(self.rack.named_parameters()),
            "lr": self.lr,
            "loss_scale": self.scaler.get_scale() if self.scaling else None,
            "batches": [
                {name: batch[name].tolist() for name in ("sample_ids", "draws", "places") if name in batch}
                for batch in batches
            ],
            "last_losses": p.guard.window,
            "failed_steps": p.guard.failed,
            "rollbacks": p.guard.rollbacks,
            "commit_of_step": self._saved_step if self._saved_step >= 0 else None,
        }

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
