"""A run on tasks: every task with several seeds, beside what simple methods reach on the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stackwise.config.objective_rules import masks
from stackwise.evaluation.nlu.coding import Coded, coded, joined
from stackwise.evaluation.nlu.metrics import bag_of_words, figures, majority
from stackwise.evaluation.nlu.probing import probe
from stackwise.evaluation.nlu.recipes import Recipe, metric_of
from stackwise.evaluation.nlu.tasks import Task
from stackwise.evaluation.nlu.tuning import answers, head_for, tune
from stackwise.objectives.denoiser import denoiser_of

if TYPE_CHECKING:
    from stackwise.data.tokenizers import Tokenizer
    from stackwise.training.stored import OpenRun

WHOLE = 1e-6
"""Share of hidden tokens that a text of a task is taken for: it goes to the stacks of the lightest noise."""

Told = Callable[[int, int, int], None]
"""Told after every step: which seed, from 0; steps done of this seed; its steps in all."""


@dataclass(frozen=True)
class Found:
    """A task's figures: of the run by seed, and of two methods that know no run. `cut`: texts that lost their end."""

    task: Task
    recipe: Recipe
    method: str
    seeds: tuple[int, ...]
    by_seed: list[dict[str, float]]
    majority: dict[str, float]
    bag_of_words: dict[str, float]
    cut: int

    @property
    def metric(self) -> str:
        """The figure the task is judged by."""
        return metric_of(self.task)

    def summary(self) -> dict[str, dict[str, float]]:
        """Figure -> its mean, lowest and highest over the seeds."""
        out = {}
        for name in self.by_seed[0]:
            values = [found[name] for found in self.by_seed]
            out[name] = {"mean": statistics.fmean(values), "lowest": min(values), "highest": max(values)}
        return out

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        task = self.task
        return {
            "kind": task.kind,
            "pair": task.pair,
            "labels": list(task.labels),
            "split": task.split,
            "files": dict(task.hashes),
            "rows": {"train": len(task.train), "scored": len(task.scored)},
            "method": self.method,
            "recipe": asdict(self.recipe),
            "metric": self.metric,
            "seeds": list(self.seeds),
            "by_seed": self.by_seed,
            "summary": self.summary(),
            "majority": self.majority,
            "bag_of_words": self.bag_of_words,
            "cut_texts": self.cut,
        }


def run_task(
    task: Task,
    open_again: Callable[[], OpenRun],
    recipe: Recipe,
    *,
    method: str,
    seeds: int,
    device: torch.device,
    dtype: torch.dtype,
    told: Told = lambda seed, done, total: None,
) -> Found:
    """Tune a fresh copy of the run for every seed from 0, and score it. Probing draws nothing, so it takes one seed."""
    numbers = tuple(range(seeds))
    most, bag = majority(task), bag_of_words(task)
    by_seed, cut = [], 0
    for number in numbers:
        opened = open_again()
        opened.rack.to(device)
        train, scored = (rows_of(task, rows, opened, recipe) for rows in (task.train, task.scored))
        cut = train.cut + scored.cut
        model = head_for(task, opened.rack, recipe, number)
        model.reader = reader_of(opened)  # type: ignore[assignment]
        if method == "probe":
            found = probe(model, train, scored)
        else:
            scale = tune(
                model,
                train,
                recipe,
                method=method,
                seed=number,
                hide_id=hide_id(opened),
                dtype=dtype,
                told=lambda done, total, number=number: told(number, done, total),  # type: ignore[misc]
            )
            found = answers(model, scored, scale)
        by_seed.append(figures(task, found))
    return Found(task, recipe, method, numbers, by_seed, most, bag, cut)


def rows_of(task: Task, rows: Any, opened: OpenRun, recipe: Recipe) -> Coded:
    """The rows as the run's rack reads them."""
    longest = min(recipe.max_tokens, opened.rack.spec.max_seq_len)
    read = coded(task, rows, opened.tokenizer, max_tokens=longest)
    if task.pair and recipe.pair == "joint":
        return joined(read, between(opened.tokenizer), longest)
    return read


def between(tokenizer: Tokenizer) -> list[int]:
    """What stands between the texts of a pair in one row: the end of a text, or a line's end where there is none."""
    return [tokenizer.eos_id] if tokenizer.eos_id is not None else tokenizer.start_ids()


def hide_id(opened: OpenRun) -> int:
    """The token that stands for a hidden one: the mask token of a run that has one, else the end of a text."""
    if masks(opened.config):
        found = opened.config.objective.mask_token_id
        assert found is not None, "a stored configuration is resolved"
        return found
    return between(opened.tokenizer)[0]


def reader_of(opened: OpenRun) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None:
    """How a rack reads a text with nothing hidden, where that is not simply through all of it: a rack that is told the time
    is told the earliest one, and of stacks that own intervals of noise those of the lightest one run.
    """
    if not masks(opened.config):
        return None
    denoiser = denoiser_of(opened.rack, opened.config, opened.tokenizer.special_ids)
    if denoiser.intervals is None and denoiser.schedule is None:
        return None

    def read(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        return denoiser.hidden(
            ids, attention_mask=mask, position_ids=positions, shares=torch.full((len(ids),), WHOLE)
        )

    return read
