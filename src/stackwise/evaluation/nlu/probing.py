"""Frozen-feature probing: what a linear model finds in the vectors of a rack that stays as it is."""

from __future__ import annotations

from typing import Any

import torch

from stackwise.evaluation.nlu.coding import Coded, batch_of, by_length
from stackwise.evaluation.nlu.metrics import STRENGTHS, chosen
from stackwise.evaluation.nlu.tasks import NUMBER, TAGS
from stackwise.model.heads import IGNORE, pool
from stackwise.model.modes import eval_mode
from stackwise.model.twin_heads import Twin


@torch.no_grad()
def vectors(model: Any, rows: Coded, *, batch_size: int = 64) -> list[Any]:
    """float32 [n, F] as lists, in the order of the rows: what the head of the model would read; of tags [words, F] per row."""
    found: list[Any] = [None] * len(rows)
    with eval_mode(model):
        for chosen in by_length(rows, batch_size):
            batch = batch_of(rows, chosen).to(model.rack.device)
            if isinstance(model, Twin):
                read = model.features(*batch.inputs)
            else:
                hidden = model.hidden(*batch.inputs).float()
                read = hidden if rows.kind == TAGS else pool(hidden, batch.inputs[1], model.pooling)
            for at, row in enumerate(chosen):
                found[row] = read[at][batch.targets[at] != IGNORE] if rows.kind == TAGS else read[at]
    return [vector.float().cpu().numpy() for vector in found]


def probe(model: Any, rows: Coded, scored: Coded) -> list[Any]:
    """Answers for `scored` of a linear model on the vectors of `rows`, as of `tuning.answers`.

    Logistic regression, for numbers ridge regression, on vectors brought to mean 0 and deviation 1. The strength of
    regularisation is chosen by cross-validation on `rows`, in five folds where every class has so many. Nothing is drawn.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x: Any = vectors(model, rows)
    z: Any = vectors(model, scored)
    if rows.kind == TAGS:
        y: Any = [label for row in rows.targets for label in row if label != IGNORE]
        sizes = [len(part) for part in z]
        x, z = np.concatenate(x), np.concatenate(z)
    else:
        y, x, z = list(rows.targets), np.stack(x), np.stack(z)
    if rows.kind == NUMBER:
        model_of = make_pipeline(StandardScaler(), RidgeCV(alphas=[10.0**k for k in range(6)]))
        return [float(v) for v in model_of.fit(x, y).predict(z)]
    strengths = {"logisticregression__C": [s / 100 for s in STRENGTHS]}
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    found = chosen(pipeline, strengths, rows.kind, y, "neg_log_loss").fit(x, y).predict(z).tolist()
    if rows.kind != TAGS:
        return found
    rest = iter(found)
    return [[next(rest) for _ in range(size)] for size in sizes]
