"""How each task is learned: one table for all. Chosen on the holdout of training rows, never by what is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackwise.evaluation.nlu.tasks import CLASSES, NUMBER, TAGS, Task

METHODS = ("full", "lora", "probe")
PAIR_FORMS = ("twin", "joint")


@dataclass(frozen=True)
class Recipe:
    """Settings of fine-tuning. `pair`: twin reads the sentences of a pair one by one and compares, joint reads them in one row."""

    epochs: int = 5
    batch_size: int = 32
    lr: float = 5e-4
    """Peak rate of the rack; that of adapters under lora is `lora_lr`."""
    head_lr: float = 2e-3
    lora_lr: float = 2e-3
    lora_rank: int = 16
    weight_decay: float = 0.05
    dropout: float = 0.1
    hidden_tokens: float = 0.0
    """Share of the tokens that are replaced at random by the mask token while it learns."""
    warmup: float = 0.1
    clip: float = 1.0
    pooling: str = "mean"
    pair: str = "twin"
    max_tokens: int = 128


OF_KIND = {CLASSES: Recipe(), NUMBER: Recipe(), TAGS: Recipe()}
OF_TASK: dict[str, Recipe] = {
    "sst2": Recipe(epochs=5, lr=1e-3, hidden_tokens=0.3, dropout=0.2),
    "cola": Recipe(epochs=4, lr=1e-3),
    "mrpc": Recipe(epochs=3, hidden_tokens=0.1),
    "rte": Recipe(epochs=3, lr=1e-3, hidden_tokens=0.1),
    "stsb": Recipe(epochs=3, hidden_tokens=0.1),
}


@dataclass(frozen=True)
class Known:
    """A task of GLUE (Wang et al. 2019, arXiv 1804.07461): its main figure, and where its columns are on the hub."""

    metric: str
    columns: tuple[str, ...]
    target: str = "label"
    dev: str = "validation"


KNOWN = {
    "cola": Known("matthews", ("sentence",)),
    "sst2": Known("accuracy", ("sentence",)),
    "mrpc": Known("f1", ("sentence1", "sentence2")),
    "stsb": Known("pearson", ("sentence1", "sentence2"), "score"),
    "qqp": Known("f1", ("question1", "question2")),
    "mnli": Known("accuracy", ("premise", "hypothesis"), dev="validation_matched"),
    "qnli": Known("accuracy", ("question", "sentence")),
    "rte": Known("accuracy", ("sentence1", "sentence2")),
    "wnli": Known("accuracy", ("sentence1", "sentence2")),
}
MAIN = {CLASSES: "accuracy", NUMBER: "pearson", TAGS: "f1"}
"""The main figure of a task that is not among them."""


def metric_of(task: Task) -> str:
    """The figure that a task is judged by."""
    known = KNOWN.get(task.name)
    fits = known is not None and (known.metric == "pearson") == (task.kind == NUMBER) and task.kind != TAGS
    return known.metric if known is not None and fits else MAIN[task.kind]


def recipe_of(task: Task, **changes: object) -> Recipe:
    """The recipe of a task by its name, else by its kind; changes that are None are left out."""
    base = OF_TASK.get(task.name, OF_KIND[task.kind])
    return replace(base, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
