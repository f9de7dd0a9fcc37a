"""`depth.json` in a run folder: the depth diagnostics of its last commit, with everything that decides their numbers."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from typing import Any

import torch

from stackwise import __version__
from stackwise.config.objective_rules import label_of, masks
from stackwise.data.corpus import Corpus
from stackwise.evaluation.depth import Depth, depth
from stackwise.evaluation.routes import routes_of
from stackwise.objectives.build import objective_of
from stackwise.storage import ops
from stackwise.tracking.folder import RunFolder
from stackwise.training.stored import OpenRun

FORMAT = "stackwise-depth"
VERSION = 1
BATCHES = 16


def measure_run(
    opened: OpenRun,
    corpus: Corpus,
    *,
    batches: int = BATCHES,
    batch_size: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """The diagnostics of a stored run on its held-out text, JSON-able. Nothing is written.

    `batches` of as many windows as the run evaluates at a time (`evaluation.batch_size`), spread over the held-out
    split; `batch_size` windows are computed together, which changes nothing.
    """
    config = opened.config
    rows = config.evaluation.batch_size or config.training.batch_size
    special = corpus.tokenizer.special_ids
    objective = objective_of(config, special)
    result = depth(
        opened.rack,
        objective,
        corpus.validation,
        seq_len=config.training.seq_len,
        routes=routes_of(opened.rack, config, special),
        batch_size=batch_size or rows,
        windows=batches * rows,
        passes=config.evaluation.passes if masks(config) else 1,
        packing=config.data.packing,
        doc_mask=config.data.doc_mask,
        pad_id=corpus.tokenizer.pad_id,
        progress=progress,
    )
    return facts_of(
        result,
        run=opened.config.training.run_id,
        commit=opened.commit.id,
        step=opened.commit.step,
        tokenizer=opened.tokenizer.hash,
        data={"corpus": corpus.hash, "source": config.data.source, "split": "validation"},
        objective=objective.name,
        label=label_of(config),
        unit=unit_of(objective, label_of(config)),
    )


def unit_of(objective: object, label: str) -> str:
    """Of the losses."""
    if getattr(objective, "predict", "token") == "noise":
        return "squared error"
    return "nats per hidden token" if label == "pseudo" else "nats per token"


def facts_of(result: Depth, **about: Any) -> dict[str, Any]:
    """What `depth.json` holds. `about`: run, commit, step, tokenizer, data, objective, label and unit."""
    found = result.to_dict()
    facts = {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "protocol": {
            "windows": result.windows,
            "seq_len": result.seq_len,
            "passes": result.passes,
            "dtype": "float32",
            "sums": "float64",
        },
        "versions": {
            "stackwise": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "views": found["views"],
    }
    return {name: _finite(value) for name, value in facts.items()}


def write_depth(folder: RunFolder, facts: dict[str, Any]) -> None:
    """Put the diagnostics into a run folder, whole or not at all."""
    ops.replace_text(folder.depth, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The same, null where a figure is no number: JSON knows neither infinity nor NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
