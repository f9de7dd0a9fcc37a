"""`TimeStepMasking` and `ProgressiveMasking`: the masks of an objective by stack, by time step and by time.

Shape letters: B batch, T positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stackwise.config.errors import ConfigError, Problem
from stackwise.objectives.base import Example
from stackwise.objectives.build import objective_of
from stackwise.objectives.depth import POINTS, StackNoise, stack_noise
from stackwise.objectives.intervals import StackMap
from stackwise.objectives.masked import Keys, Masked
from stackwise.objectives.schedules import NoiseSchedule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

TIME = "training.progressive.time_interpretation"
_NO_TOKEN = 2**31 - 1  # stands for a mask token whose id is not known yet; no text holds it


class TimeStepMasking:
    """Masks for the stacks and times of a configuration, equal to those of a training run with it.

    With `time_interpretation` depth (auto is read as depth) every stack owns an interval of noise, or one share of
    masked tokens (`time_step_mask_fractions`), and `horizon / N` time steps. With input, time is drawn for each sample.
    `stack_idx` is the build index of a stack; their number N is `target_stacks`, else `max_stacks`.

    A time is an int or a float. An int is a step k of the horizon, 0 … H - 1. A float is t in (0, 1], where the noise
    schedule gives the masked share r(t); with point masks it falls into the step min(floor(t H), H - 1).

    `batch` is a dict with `input_ids` [B, T], and `attention_mask` [B, T], `sample_ids` [B] and `draws` [B] where there
    are any; rows without sample ids are numbered. `special_ids` are the tokens that are never corrupted.
    `time_mapping` (stack_idx, N, horizon) -> first time step the stack owns, in place of `stack_time_mapping`.

    Raises: ConfigError for an interpretation that is neither, intervals with a gap or out of order, descending point
    masks, a horizon that the stacks do not fill.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        time_mapping: StackMap | None = None,
        *,
        special_ids: Collection[int] = (),
    ) -> None:
        keys = config.training.progressive
        self.interpretation = "depth" if keys.time_interpretation == "auto" else keys.time_interpretation
        if self.interpretation == "none":
            raise ConfigError(
                Problem(TIME, "leaves a masking object without time", "none", "auto, depth, input")
            )
        self.config, self.special_ids = config.model_copy(deep=True), tuple(special_ids)
        objective = config.objective
        self.schedule = NoiseSchedule(objective.noise_schedule, objective.noise_power, objective.noise_table)
        self.n_stacks = keys.target_stacks or keys.max_stacks
        self._noise: StackNoise | None = None
        if self.interpretation == "depth":
            self._noise = stack_noise(config, self.n_stacks, time_mapping)
            self.horizon = self._noise.starts[-1]
            if self._noise.points is not None and 1.0 in self._noise.points:
                warnings.warn(
                    f"{POINTS} holds a share of 1: that stack sees no token at all", UserWarning, stacklevel=2
                )
        else:
            for given, key in ((time_mapping, "time_mapping"), (keys.time_step_mask_fractions, POINTS)):
                if given is not None:
                    text = "shares time out among stacks, but time is an input of the model"
                    raise ConfigError(Problem(key, text, hint=f"remove it, or set {TIME} to depth"))
            self.horizon = keys.num_time_steps or self.n_stacks * keys.time_per_stack

    def get_time_step_for_stack(self, stack_idx: int) -> int:
        """The first time step the stack owns. Raises: IndexError for no such stack, ValueError in input mode."""
        noise = self._by_depth()
        return noise.starts[noise.distance(stack_idx)]

    def get_interval_for_stack(self, stack_idx: int) -> tuple[float, float]:
        """(lo, hi): the stack owns the masked shares lo < r <= hi; together the stacks own (0, 1], each share once.

        Raises: IndexError for no such stack; ValueError with point masks, which own no interval, and in input mode.
        """
        noise = self._by_depth()
        distance = noise.distance(stack_idx)
        if noise.intervals is None:
            raise ValueError(
                f"{POINTS} gives each stack one share and no interval, so no bound either; see mask_ratio"
            )
        return noise.intervals.of(distance)

    def generate_masks_for_stack(self, batch: Mapping[str, Tensor], stack_idx: int) -> Tensor:
        """bool [B, T], True = corrupted: what the stack is trained on, its share of noise drawn for each sample.

        The share comes from the stack's interval widened by `time_overlap`, or is its point mask.
        Raises: IndexError for no such stack; ValueError in input mode; KeyError for a batch without `input_ids`.
        """
        return self._masks(batch, self.noise_of_stack(stack_idx))

    def noise_of_stack(self, stack_idx: int) -> tuple[float, float]:
        """(lo, hi): the masked shares that the stack is trained on, its interval widened by `time_overlap`.

        Twice the same share with point masks. Raises: IndexError for no such stack; ValueError in input mode.
        """
        noise = self._by_depth()
        return noise.trains_on(noise.distance(stack_idx))

    def generate_masks_for_time_step(self, batch: Mapping[str, Tensor], t: float | Tensor) -> Tensor:
        """bool [B, T], True = corrupted, at the share `mask_ratio(t)`; t is one time, or one for each row [B].

        Unless `objective.nested_masks` is off, the masks of a sample at two times lie inside each other. Raises as `mask_ratio`; KeyError without `input_ids`.
        """
        if not isinstance(t, Tensor) or t.ndim == 0:
            share = self.mask_ratio(t.item() if isinstance(t, Tensor) else t)
            return self._masks(batch, (share, share))
        rows = len(batch["input_ids"]) if "input_ids" in batch else len(t)
        if t.shape != (rows,):
            raise ValueError(f"t is {list(t.shape)}, but must be one time or [{rows}], one for each row")
        numbered = {"sample_ids": torch.arange(rows), **batch}
        each = [self.mask_ratio(time) for time in t.tolist()]
        parts = [
            self._masks({name: field[i : i + 1] for name, field in numbered.items()}, (share, share))
            for i, share in enumerate(each)
        ]
        return torch.cat(parts)

    def mask_ratio(self, t: float) -> float:
        """The share of masked tokens at a time: a step (int) or t in (0, 1] (float). ValueError outside.

        A step of depth mode lies in its owner's interval, whose upper end is the last step's; a step k of input mode
        is the time (k + 1)/H.
        """
        step = isinstance(t, int)
        if not step and not 0 < t <= 1:
            raise ValueError(f"t is {t}, outside (0, 1]; a time step is an int")
        if self._noise is not None and (step or self._noise.intervals is None):
            return self._noise.share_at(int(t) if step else int(self.step_of(torch.tensor(t))))
        if step and not 0 <= t < self.horizon:
            raise ValueError(f"time step {t} is outside 0 to {self.horizon - 1}, the last of the horizon")
        return self.schedule.rate((t + 1) / self.horizon if step else t)

    def sample_time(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Times in (0, 1], float64 [B]: one for each sample, or with `time_sampling: batch` one for all rows.

        Drawn as `objective.t_sampling` says; stratified and antithetic times go by `places` of the batch, else sample ids.
        """
        keys = Keys.of(batch, self.config.objective.mask_draws)
        times = keys.times(self.config.training.seed, self.config.objective.t_sampling)
        one = self.config.training.progressive.time_sampling == "batch"
        return times[:1].expand_as(times) if one else times

    def step_of(self, t: Tensor) -> Tensor:
        """The time steps, int64, of times in (0, 1]: min(floor(t H), H - 1)."""
        return (t.double() * self.horizon).long().clamp_max(self.horizon - 1)

    def corrupt(
        self, ids: Tensor, masks: Tensor, sample_ids: Tensor | None = None, draws: Tensor | None = None
    ) -> Tensor:
        """ids [B, T] with the tokens at masks [B, T] replaced, as `objective.corruption` says.

        Random tokens of bert corruption are drawn by sample_ids [B] and draws [B]; without them, by row and for draw 0.
        Raises: ConfigError where no mask token is known; ValueError under gaussian corruption, which leaves ids alone.
        """
        objective = self.objective
        if objective.corruption == "gaussian":
            raise ValueError("gaussian corruption adds noise to embeddings and leaves ids as they are")
        batch = {"input_ids": ids, "sample_ids": sample_ids, "draws": draws}
        keys = Keys.of({k: v for k, v in batch.items() if v is not None}, objective.draws)
        return objective.replaced(ids.long(), masks, keys)

    def _masks(self, batch: Mapping[str, Tensor], noise: tuple[float, float]) -> Tensor:
        example: Example = self._objective.corrupt(batch, noise)
        return self._objective.masks_of(example)

    def _by_depth(self) -> StackNoise:
        if self._noise is None:
            raise ValueError(
                f"{TIME} is input: no stack owns a time; draw times with sample_time(batch) and pass them to"
                " generate_masks_for_time_step"
            )
        return self._noise

    @property
    def objective(self) -> Masked:
        """The objective of a run with this configuration. Raises: ConfigError where no mask token is known."""
        if self._objective.vocabulary.mask_id == _NO_TOKEN:
            hint = "set objective.mask_token_id, or model.vocab_size to get a new id"
            raise ConfigError(Problem("objective.mask_token_id", "no mask token is known", None, hint=hint))
        return self._objective

    @cached_property
    def _objective(self) -> Masked:
        """The objective of the run, so that its masks are these. Without a vocabulary it can still choose positions."""
        config = self.config.model_copy(deep=True)
        config.training.progressive.time_interpretation = self.interpretation
        keys, size = config.objective, config.model.vocab_size
        if keys.mask_token_id is None:
            adds = size is not None and keys.add_mask_token
            keys.mask_token_id = size if adds else _NO_TOKEN
            config.model.vocab_size = size + 1 if adds and size is not None else size
        config.model.vocab_size = config.model.vocab_size or 2
        objective = objective_of(config, self.special_ids)
        if not isinstance(objective, Masked):
            key = "training.progressive.training_objective"
            raise ConfigError(Problem(key, "masks nothing", objective.name, "mlm, diffusion"))
        return objective


class ProgressiveMasking(TimeStepMasking):
    """One share of masked tokens for each stack, rising from `min_mask_fraction` at the head to `max_mask_fraction`.

    `TimeStepMasking` with `time_step_mask_fractions: schedule`; `mask_schedule_type` is its shape. Such masks have no
    likelihood bound. Raises: ConfigError as `TimeStepMasking`, and for other point masks in the configuration.
    """

    def __init__(self, config: StackWiseConfig, *, special_ids: Collection[int] = ()) -> None:
        given = config.training.progressive.time_step_mask_fractions
        if given not in (None, "schedule"):
            hint = "TimeStepMasking takes fractions of one's own"
            raise ConfigError(Problem(POINTS, "not of ProgressiveMasking", given, "schedule, null", hint))
        config = config.model_copy(deep=True)
        config.training.progressive.time_step_mask_fractions = "schedule"
        super().__init__(config, special_ids=special_ids)
