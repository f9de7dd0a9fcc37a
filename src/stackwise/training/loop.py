"""The one training loop. It runs any list of stages and knows no curriculum.

for stage in stages:
    grow, derive the split, build the optimizer          _begin
    for step in stage.steps:
        batches -> loss -> gradients -> step             Stepping._train_step
        log, save, evaluate, sample                      _after_step
    save, evaluate, record                               _finish
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.objective_rules import time_of
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.assemble import realise
from stackwise.curriculum.specs import stage_spec, stage_specs
from stackwise.curriculum.stage import Stage
from stackwise.model.rack import Rack
from stackwise.objectives.base import Objective
from stackwise.objectives.build import objective_of
from stackwise.training import records
from stackwise.training.consistency import consistency_of
from stackwise.training.device import run_format
from stackwise.training.errors import GoBack, Interrupted
from stackwise.training.guard import Guard
from stackwise.training.hooks import Hooks, Loader
from stackwise.training.interrupt import InterruptGuard
from stackwise.training.memory import is_out_of_memory
from stackwise.training.optim import Optimizers, OptimizerState, carried
from stackwise.training.parked import resting
from stackwise.training.progress import Progress
from stackwise.training.stage_setup import StageSetup, set_up, shared_samples
from stackwise.training.stepping import Stepping
from stackwise.trunk.manager import MemoryManager


class Engine(Stepping):
    """Runs stages over a growing rack. After `run`, `rack` is the trained one."""

    def __init__(
        self,
        config: StackWiseConfig,
        rack: Rack,
        stages: list[Stage],
        loader: Loader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        hooks: Hooks | None = None,
        progress: Progress | None = None,
        identity: Mapping[str, str] | None = None,
        objective: Objective | None = None,
    ) -> None:
        """`objective` null: that of the config, for a tokenizer without special tokens. `identity` names the data that the loader's sample ids belong to (`trunk.keys.IDENTITY`); without it no
        outputs of the trunk are stored."""
        self.config, self.stages, self.loader = config, stages, loader
        self.device, self.dtype = device, dtype
        training = config.training
        resident = training.residency == training.progressive.trunk_residency == "resident"
        self.rack = rack.to(device) if resident else rack  # what is streamed may not fit: `set_up` places it
        self.hooks = hooks or Hooks()
        self.progress = progress or Progress()
        self.guard = Guard(training, self.progress.guard)
        if self.hooks.keeper is None:
            self.guard.refuse_going_back()
        self.objective = objective or objective_of(config)
        self.run_format = run_format(config, dtype, device)
        self.identity, self.manager = identity, MemoryManager.of(config.training.progressive)
        self.optimizers: Optimizers | None = None
        self.parked: OptimizerState = {}
        """Moments of parameters that rest now and train again later."""
        self.setup: StageSetup | None = None
        self.scaler = torch.amp.GradScaler(device.type)
        self.scaling = self.has_scaled = False  # in this stage, in any so far
        chunk = config.training.loss_chunk_tokens
        self._rows_per_chunk = None if chunk == "auto" else int(chunk)
        self._batches = iter(loader)
        self._resumed = self.progress.step > 0
        self._warned = False
        self._saved_step = self.progress.step if self._resumed else -1
        self._logged_at = (time.perf_counter(), self.progress.tokens)

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Run the stages that are left; returns the history, one entry per stage.

        Raises NumericError where the numerics guard stops the run, GoBack where it goes back to an earlier commit,
        OutOfMemory, and Interrupted after a signal, once the state is saved.
        """
        done = False
        try:
            with InterruptGuard() as guard:
                try:
                    while self.progress.stage < len(self.stages):
                        self._run_stage(self.stages[self.progress.stage], guard)
                    self.report_saves(wait=True)
                except GoBack as wish:
                    if guard.signum is None:
                        raise
                    message = (
                        f"stopped, and saved nothing after the commit of step {self._saved_step}: {wish}"
                    )
                    raise Interrupted(guard.signum, message) from None
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise self.out_of_memory(self.stages[self.progress.stage], error) from error
            done = True
        finally:
            self.manager.close(remove=done)  # what a stopped run has stored serves when it is resumed
        return self.progress.history

    def _run_stage(self, stage: Stage, guard: InterruptGuard) -> None:
        if not self.progress.begun:
            self._begin(stage)
        elif self._resumed:
            self._take_up(stage)
        while self.progress.stage_step < stage.steps:
            self._train_step(stage)
            self._after_step(stage)
            if self.progress.stage_step < stage.steps:
                self._stop_if_asked(guard, stage)
        self._finish(stage)
        self._stop_if_asked(guard, stage)

    def _begin(self, stage: Stage) -> None:
        """Grow, store what froze, attach adapters, freeze, and build the optimizer of a stage."""
        self.doing = "the setup"
        p, before = self.progress, dict(self.parked)
        self.report_saves(wait=True)  # what rested may change now
        if self.optimizers is not None:
            before.update(self.optimizers.state())
        uids = {s.uid for s in self.rack.spec.stacks}
        last = self.stages[max(0, p.stage - 1)]
        # around a growth losses are shown beside each other, so they must be of the same text, noise and part of the rack
        shown = stage.grow is not None and (last.scored_noise, last.alone) == (
            stage.scored_noise,
            stage.alone,
        )
        if shown and p.eval_loss is not None:
            self.hooks.emit(records.evaluation(p, "before_growth", {"loss": p.eval_loss}))
        spec = stage_spec(self.config, self.rack.spec, stage, self.run_format)
        training = self.config.training
        merges = training.progressive.trunk_lora_mode == "merge"
        self.rack, copies = realise(self.rack, stage, spec, seed=training.seed, merge_trunk=merges)
        followed = p.stores is True
        p.start_stage()
        self.loader.reshape(stage.seq_len, stage.batch_size)
        if stage.data_start is not None:
            self.loader.seek(stage.data_start * training.gradient_accumulation_steps)
        if p.guard.leap and p.guard.leap[0] == p.stage:
            p.stage_batches = p.guard.leap[1]
            self.loader.skip(p.stage_batches)
        self._batches = iter(self.loader)
        self._set_up(stage, followed)
        assert self.optimizers is not None
        self.optimizers.load(carried(before, stage.optimizer_state, copies))
        later = self.stages[p.stage + 1 :]
        specs = stage_specs(self.config, later, spec, self.run_format)
        self.parked = resting(before, self.optimizers.names.values(), later, specs)
        if self.hooks.keeper is not None:
            self.hooks.keeper.begin(self)
        grown = [s.uid for s in self.rack.spec.stacks if s.uid not in uids]
        self._announce(stage, grown)
        if shown and self.hooks.evaluate is not None:
            self._evaluate("after_growth")

    def _set_up(self, stage: Stage, followed: bool = False) -> None:
        """What trains, in which split, from which trunk, with which optimizer.

        `followed`: the stage before has stored the outputs of its trunk.
        """
        n_samples = None if self.identity is None else self.loader.rows  # type: ignore[attr-defined]
        shares = shared_samples(self.stages, self.progress.stage, self.config, n_samples or 1)
        self._stored_before = self.manager.report()
        for name in ("hits", "evicted"):  # of a stopped process that began the stage
            self._stored_before[name] -= self.progress.stored.get(name, 0)
        self.setup = set_up(
            self.rack,
            stage,
            self.config,
            device=self.device,
            run_format=self.run_format,
            objective=self.objective,
            manager=self.manager,
            identity=self.identity or {},
            n_samples=n_samples,
            follows=shares[0] if followed else 0.0,
            later=shares[1],
            stores=self.progress.stores,
        )
        self.setup.consistency = consistency_of(
            self.config, self.stages, self.progress.stage, self.rack.spec, self.setup.units
        )
        self.scaling = self.dtype == torch.float16 or self.setup.scales
        self.has_scaled = self.has_scaled or self.scaling
        self.progress.stores = self.setup.decision.use
        self.optimizers = self.setup.optimizers
        dropouts = [module.p for module in self.rack.modules() if isinstance(module, nn.Dropout)]
        self._has_dropout = any(dropouts) or any(b.dropout for b in self.rack.spec.blocks)  # attention's own

    def _announce(self, stage: Stage, new: list[str]) -> None:
        assert self.setup is not None
        self.hooks.emit(records.stage_start(self.rack, self.setup.split, self.progress, stage, new))
        decision = self.setup.decision
        if self.setup.split.prefix_blocks or decision.warn:
            self.hooks.emit({"event": "note", "message": f"frozen trunk {decision.reason}"})

    def restore(self, optimizer_state: dict[str, dict[str, Tensor]]) -> None:
        """Rebuild what surrounds a loaded rack: split, optimizer and moments of the stage in progress."""
        training: set[str] = set()
        if self.progress.begun:
            self._set_up(self.stages[self.progress.stage])
            assert self.optimizers is not None
            self.optimizers.load(optimizer_state)
            training = set(self.optimizers.names.values())
            if self.hooks.keeper is not None:
                self.hooks.keeper.begin(self)
        self.parked = {name: held for name, held in optimizer_state.items() if name not in training}

    def drop(self) -> None:
        """Let go of weights and moments, which another engine will hold."""
        del self.rack
        self.optimizers, self.setup, self.parked = None, None, {}

    def save_again(self) -> None:
        """Save what was just restored, because something of it has changed."""
        self._save(None)

    def _take_up(self, stage: Stage) -> None:
        """After a resume: do what followed the save that was loaded."""
        self._resumed = False
        self._announce(stage, [])
        if 0 < self.progress.stage_step < stage.steps:
            self._observe(stage)

    # --- around the steps --------------------------------------------------------------------------------------

    def _after_step(self, stage: Stage) -> None:
        p = self.progress
        last = p.stage_step == stage.steps
        self.report_saves()
        if p.stage_step == 1 or last or p.step % self.config.tracking.log_interval == 0:
            self._log()
        if last:
            return  # the end of the stage saves, evaluates and samples
        if p.step % self.config.checkpoint.save_interval == 0:
            self._save(None)
        self._observe(stage)

    def _observe(self, stage: Stage) -> None:
        """Evaluate and sample where the config asks for it, after the save."""
        p = self.progress
        every, sample_every = self.config.evaluation.interval, self.config.tracking.sample_interval
        if every and p.step % every == 0:
            self._evaluate("interval")
        if sample_every and p.step % sample_every == 0:
            self._sample()

    def _finish(self, stage: Stage) -> None:
        assert self.setup is not None
        p = self.progress
        if p.stage + 1 == len(self.stages) and any(s.spectral for s in self.rack.spec.stacks):
            self.report_saves(wait=True)
            self.rack.fold_spectral_norm()  # what a run leaves behind is plain
            if self.hooks.keeper is not None:
                self.hooks.keeper.begin(self)
        self._count_stored()
        if self._saved_step != p.step:
            self._save(f"stage-{p.stage + 1:02d}")
        eval_loss = self._evaluate("final" if p.stage + 1 == len(self.stages) else "stage_end")
        self._sample()
        record = records.stage_end(self.rack, p, stage, eval_loss)
        self.hooks.emit({"event": "stage_end", **record})
        p.history.append({**record, "steps": p.stage_step, "trains": sorted(self.setup.units)})
        p.stage, p.begun = p.stage + 1, False

    def _log(self) -> None:
        p, now = self.progress, time.perf_counter()
        then, tokens = self._logged_at
        self._logged_at = (now, p.tokens)
        rate = (p.tokens - tokens) / max(now - then, 1e-9)
        for event in (records.step(p, self.lr, self.grad_norm, rate), *self.balance.events(p)):
            self.hooks.emit(event)
        p.loss_sum, p.loss_count = 0.0, 0

    def _count_stored(self) -> None:
        if self.progress.stores:
            self.progress.stored = records.stored(self.manager.report(), self._stored_before)

    def _save(self, pin: str | None) -> None:
        if self.hooks.keeper is not None:
            since = time.perf_counter()
            self.doing = "the save"
            self.refuse_what_is_not_finite()
            self._count_stored()
            self.hooks.keeper.save(self, pin, since)
            self._saved_step = self.progress.step
            self.report_saves()
            self._logged_at = (time.perf_counter(), self.progress.tokens)

    def report_saves(self, *, wait: bool = False) -> None:
        """Report what is on the disk by now; what went wrong beside the training is raised here."""
        if self.hooks.keeper is not None:
            self.doing = "the save"
            if wait:
                self.hooks.keeper.drain()
            for event in self.hooks.keeper.events():
                self.hooks.emit(event)
                if event["event"] == "checkpoint":
                    self._watch_grace(event["seconds"])

    def _watch_grace(self, seconds: float) -> None:
        """Say once that who stops the run may not wait for the save."""
        grace = self.config.checkpoint.grace_seconds
        if grace is None or seconds <= grace / 2 or self._warned:
            return
        self._warned = True
        message = (
            f"a save takes {seconds:.1f} s, more than half of checkpoint.grace_seconds ({grace:g}): whoever stops the run by "
            "SIGTERM may kill it before its state is saved. Save more often, to a faster disk, or ask for more time"
        )
        self.hooks.emit({"event": "note", "message": message})

    def _evaluate(self, when: str) -> float | None:
        if self.hooks.evaluate is None:
            return None
        self.doing = "the evaluation"
        noise = self.stages[min(self.progress.stage, len(self.stages) - 1)].scored_noise
        result = self.hooks.evaluate(self.rack) if noise is None else self.hooks.evaluate(self.rack, noise)
        self.progress.eval_loss = result["loss"]
        self.hooks.emit(records.evaluation(self.progress, when, result))
        if self._saved_step == self.progress.step and when != "after_growth":
            self.hooks.scored(self.progress.step, result["loss"])
        self._logged_at = (time.perf_counter(), self.progress.tokens)
        return self.progress.eval_loss

    def _sample(self) -> None:
        p = self.progress
        if self.hooks.sample is None:
            return
        if time_of(self.config) == "depth" and p.stage + 1 < len(self.stages):
            return  # a text needs every share of noise, and stacks for some of them have yet to train
        self.doing = "the sample"
        prompt, text = self.hooks.sample(self.rack)
        self.hooks.emit({"event": "sample", "step": p.step, "stage": p.stage, "prompt": prompt, "text": text})

    def _stop_if_asked(self, guard: InterruptGuard, stage: Stage) -> None:
        if guard.signum is None:
            return
        p = self.progress
        saved = "nothing was saved (no run folder)"
        if self.hooks.keeper is not None and p.begun:
            if self._saved_step != p.step:
                self._save(None)
            saved = "the state is saved"
        elif self.hooks.keeper is not None:
            saved = "the state was saved at the end of the stage"
        self.report_saves(wait=True)
        raise Interrupted(guard.signum, f"stopped after step {p.step} ({stage.name}); {saved}")
