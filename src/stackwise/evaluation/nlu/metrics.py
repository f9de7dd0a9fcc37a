"""Figures of a task, by scikit-learn and SciPy, and what simple methods reach."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from stackwise.evaluation.nlu.recipes import metric_of
from stackwise.evaluation.nlu.tasks import CLASSES, NUMBER, TAGS, Rows, Task

Predictions = Sequence[Any]
"""Of each row a class, a number, or the tags of its words; of words that were cut off there is none."""
NO_TAG = "O"


def figures(task: Task, found: Predictions, rows: Rows | None = None) -> dict[str, float]:
    """Figures by name. `rows`: what was scored, null: those of the task.

    accuracy, f1 (two classes: of the last label; more: the mean over those that occur), matthews; pearson, spearman, which are 0
    where all numbers are the same; for tags accuracy and f1 over the words whose tag is not O. A word without a
    prediction counts as wrong.
    """
    from scipy import stats
    from sklearn import metrics

    wanted: Sequence[Any] = (rows or task.scored).targets
    if task.kind == NUMBER:
        a, b = np.asarray(found, float), np.asarray(wanted, float)
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            both = (stats.pearsonr(a, b).statistic, stats.spearmanr(a, b).statistic)
        return dict(
            zip(("pearson", "spearman"), (float(v) if math.isfinite(v) else 0.0 for v in both), strict=True)
        )
    if task.kind == CLASSES:
        average = {"average": "binary", "pos_label": 1} if len(task.labels) == 2 else {"average": "macro"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # all rows are of one class: the correlation is 0
            matthews = float(metrics.matthews_corrcoef(wanted, found))
        return {
            "accuracy": float(metrics.accuracy_score(wanted, found)),
            "f1": float(metrics.f1_score(wanted, found, zero_division=0.0, **average)),
            "matthews": matthews,
        }
    flat = [tag for row in wanted for tag in row]
    lost = len(task.labels)
    own = [
        tag
        for row, tags in zip(found, wanted, strict=True)
        for tag in [*row, *[lost] * (len(tags) - len(row))]
    ]
    counted = [i for i, label in enumerate(task.labels) if label != NO_TAG]
    return {
        "accuracy": float(metrics.accuracy_score(flat, own)),
        "f1": float(metrics.f1_score(flat, own, labels=counted, average="micro", zero_division=0.0)),
    }


def majority(task: Task) -> dict[str, float]:
    """Figures of always the commonest label of training, or its mean number."""
    if task.kind == NUMBER:
        return figures(task, [float(np.mean(np.asarray(task.train.targets, float)))] * len(task.scored))
    targets: Sequence[Any] = task.train.targets
    flat = [tag for row in targets for tag in row] if task.kind == TAGS else targets
    most = int(np.bincount(np.asarray(flat, int)).argmax())
    if task.kind == TAGS:
        return figures(task, [[most] * len(words) for words in task.scored.texts])
    return figures(task, [most] * len(task.scored))


STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Of regularisation; one of them is chosen by five-fold cross-validation on the training rows."""
WORD = r"(?u)\b\w+\b"


def chosen(model: Any, grid: dict[str, list[float]], kind: str, y: Sequence[Any], scoring: str) -> Any:
    """The model with its strength left to cross-validation, in as many folds as every class has rows, five at most.

    A class of a single row is in no fold: it cannot be learned from one and asked for in another. Where less than two classes
    (or numbers) are left the strength is the one that the model comes with.
    """
    from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold

    counts = np.bincount(y) if kind != NUMBER else np.array([])
    several = np.flatnonzero(counts > 1)
    if len(several) < 2 and (kind != NUMBER or len(y) < 2):
        return model
    if kind == NUMBER:
        return GridSearchCV(model, grid, cv=KFold(min(5, len(y))), scoring=scoring)
    rows = np.flatnonzero(np.isin(y, several))
    folds = StratifiedKFold(min(5, int(counts[several].min())))
    splits = [(rows[a], rows[b]) for a, b in folds.split(rows, np.asarray(y)[rows])]
    return GridSearchCV(model, grid, cv=splits, scoring=scoring)


def bag_of_words(task: Task) -> dict[str, float]:
    """Figures of logistic regression, for numbers ridge regression, on counts of lower-case words.

    Of a pair each text has a bag of its own. For tags the words are those at the place, before it and behind it. Training
    texts without a single word leave nothing but `majority`.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    if task.kind == TAGS:
        table = DictVectorizer()
        x = table.fit_transform([f for words in task.train.texts for f in _places(words)])
        z = table.transform([f for words in task.scored.texts for f in _places(words)])
        y: Any = [tag for row in task.train.targets for tag in row]  # type: ignore[union-attr]
    elif not any(re.search(WORD, text) for texts in task.train.texts for text in texts):
        return majority(task)
    else:
        x, z = _bags(task)
        y = list(task.train.targets)
    if task.kind == NUMBER:
        grid = {"alpha": [1 / strength for strength in STRENGTHS]}
        model = chosen(Ridge(), grid, task.kind, y, "neg_mean_squared_error")
    else:
        grid = {"C": list(STRENGTHS)}
        model = chosen(LogisticRegression(max_iter=1000), grid, task.kind, y, _scorer(task))
    found = model.fit(x, y).predict(z).tolist()
    if task.kind != TAGS:
        return figures(task, found)
    rest = iter(found)
    return figures(task, [[next(rest) for _ in words] for words in task.scored.texts])


def _scorer(task: Task) -> str:
    """scikit-learn's name of the figure that the task is judged by."""
    figure = metric_of(task)
    several = "_macro" if figure == "f1" and len(task.labels) > 2 else ""
    return "matthews_corrcoef" if figure == "matthews" else figure + several


def _bags(task: Task) -> tuple[Any, Any]:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(token_pattern=WORD)
    words.fit([text for texts in task.train.texts for text in texts])
    sides = range(2 if task.pair else 1)
    return tuple(
        hstack([words.transform([texts[side] for texts in rows.texts]) for side in sides]).tocsr()
        for rows in (task.train, task.scored)
    )


def _places(words: Sequence[str]) -> list[dict[str, str]]:
    padded = ["", *(word.lower() for word in words), ""]
    return [{"before": padded[i], "word": padded[i + 1], "behind": padded[i + 2]} for i in range(len(words))]
