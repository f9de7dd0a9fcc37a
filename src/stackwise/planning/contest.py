"""Configs that are to be compared: the same held-out text and measure for all, and the same budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.objective_rules import label_of, masks
from stackwise.config.resolve import resolve
from stackwise.planning.budget import Axis, cost_of, matched, steps_of
from stackwise.tracking import units

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.data.corpus import Corpus
    from stackwise.planning.facts import Data

__all__ = ["Contestant", "Entry", "Ground", "common_ground", "fitted"]


@dataclass(frozen=True)
class Entry:
    """A config of a comparison. `label` names it, `family` the config that it is a size of."""

    label: str
    config: StackWiseConfig
    family: str


@dataclass(frozen=True)
class Ground:
    """What all entries stand on: one prepared corpus, and what each entry's plan must know of it, in their order."""

    corpus: Corpus
    data: list[Data]


@dataclass(frozen=True)
class Contestant:
    """An entry with the steps that its budget allows. `target` is the budget, `cost` what its run of `steps`
    optimizer steps costs, by `axis`.

    `name`: its label, with the budget where there are several.
    """

    name: str
    entry: Entry
    config: StackWiseConfig
    axis: Axis
    target: float
    cost: float
    steps: int

    @property
    def deviation(self) -> float:
        """By which share of the budget the run costs more, or less."""
        return self.cost / self.target - 1


def common_ground(entries: Sequence[Entry]) -> Ground:
    """The data of the entries, which must be the same, as must be all that a held-out loss depends on.

    Prepares the corpus. ConfigError with every entry that would be measured in another way than the first.
    """
    from stackwise.data.prepare import prepare
    from stackwise.planning.facts import data_facts

    problems = [problem for entry in entries[1:] for problem in _other_measure(entries[0], entry)]
    if problems:
        raise ConfigError(problems)
    corpora = []
    for entry in entries:
        resolved, _ = resolve(entry.config)
        assert resolved.data.cache_dir is not None
        corpora.append(prepare(resolved.data, resolved.data.cache_dir))
    first = corpora[0]
    problems = [
        problem
        for entry, corpus in zip(entries[1:], corpora[1:], strict=True)
        for problem in _other_data(entry, corpus, entries[0], first)
    ]
    if problems:
        raise ConfigError(problems)
    return Ground(first, [data_facts(entry.config, first) for entry in entries])


def fitted(
    entries: Sequence[Entry], ground: Ground, axis: Axis, targets: Sequence[float] | None
) -> list[Contestant]:
    """Every entry at every budget; `targets` null: the cost of the first entry as it stands.

    A budget below one step of an entry is a ConfigError.
    """
    if targets is None:
        targets = [cost_of(entries[0].config, axis, ground.data[0])]
    contestants, problems = [], []
    for target in targets:
        for entry, data in zip(entries, ground.data, strict=True):
            config = matched(entry.config, axis, target, data)
            name = entry.label + (f"-{units.tick(target).replace(' ', '')}" if len(targets) > 1 else "")
            contestant = Contestant(
                name, entry, config, axis, target, cost_of(config, axis, data), steps_of(config, data)
            )
            contestants.append(contestant)
            if contestant.deviation > 0.5:
                problems.append(
                    Problem(
                        "",
                        f"a run of the fewest steps costs {contestant.cost:.3g} {axis}, and the budget is {target:.3g}",
                        hint="raise the budget, or lower training.batch_size",
                        file=entry.label,
                    )
                )
    if problems:
        raise ConfigError(problems)
    return contestants


_MEASURE: dict[str, Callable[[StackWiseConfig], Any]] = {
    "training.seq_len": lambda c: c.training.seq_len,
    "data.packing": lambda c: c.data.packing,
    "data.doc_mask": lambda c: c.data.doc_mask,
    "evaluation.batches": lambda c: c.evaluation.batches,
    "evaluation.batch_size": lambda c: (
        None if c.evaluation.batches is None else c.evaluation.batch_size or c.training.batch_size
    ),
    "evaluation.passes": lambda c: c.evaluation.passes if masks(c) else None,
}
"""What a held-out loss depends on besides the text, the tokenizer and the objective."""


def _other_measure(first: Entry, other: Entry) -> list[Problem]:
    found = [
        Problem(
            key,
            f"{first.label} is evaluated with another value, and the losses would not compare",
            read(other.config),
            allowed=str(read(first.config)),
            hint=f"give both the same {key}",
            file=other.label,
        )
        for key, read in _MEASURE.items()
        if read(first.config) != read(other.config)
        and (key != "evaluation.passes" or masks(first.config) == masks(other.config))
    ]
    labels = [label_of(entry.config) for entry in (first, other)]
    same = labels[0] != "pseudo" or first.config.objective == other.config.objective
    if labels[0] != labels[1] or not same:
        found.append(
            Problem(
                "training.progressive.training_objective",
                f"its held-out loss is {labels[1]}, that of {first.label} {labels[0]}, under another objective: they are "
                "not the same measure",
                other.config.training.progressive.training_objective,
                hint="compare configs of one objective",
                file=other.label,
            )
        )
    return found


def _other_data(entry: Entry, corpus: Corpus, first: Entry, reference: Corpus) -> list[Problem]:
    if corpus.hash == reference.hash:
        return []
    if corpus.tokenizer.hash != reference.tokenizer.hash:
        return [
            Problem(
                "data.tokenizer",
                f"another tokenizer than that of {first.label}: losses in nats per token do not compare",
                entry.config.data.tokenizer,
                hint="train each by itself and compare bits per byte: stackwise runs compare RUN RUN",
                file=entry.label,
            )
        ]
    return [
        Problem(
            f"data, {part} text" if part == "train" else "data, held-out text",
            f"not the text of {first.label}",
            hint="give all the same data.source, data.path, data.eval_path and data.eval_fraction",
            file=entry.label,
        )
        for part in ("train", "validation")
        if corpus.manifest["recipe"][part] != reference.manifest["recipe"][part]
    ]
