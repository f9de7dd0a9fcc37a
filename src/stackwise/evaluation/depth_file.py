"""`depth.json` in a run folder: the depth diagnostics of its last commit, with everything that decides their numbers."""

from __future__ import annotations

import json
from typing import Any

from stackwise.config.objective_rules import label_of, masks
from stackwise.data.corpus import TokenSplit
from stackwise.evaluation.depth import depth
from stackwise.evaluation.record import finite, record_of
from stackwise.evaluation.routes import routes_of
from stackwise.evaluation.windows import Progress, unseen
from stackwise.objectives.build import objective_of
from stackwise.storage import ops
from stackwise.training.stored import OpenRun

BATCHES = 16


def depth_record(
    opened: OpenRun,
    split: TokenSplit,
    *,
    data: str,
    batches: int = BATCHES,
    batch_size: int | None = None,
    progress: Progress = unseen,
) -> dict[str, Any]:
    """The diagnostics of a stored run on a held-out split, JSON-able; `data` is the hash that names it. Nothing is written.

    `batches` of `training.batch_size` windows, spread over the split; `batch_size` windows are computed together, which
    changes nothing. A figure that is no finite number is null.
    """
    config = opened.config
    rows = config.training.batch_size
    special = opened.tokenizer.special_ids
    objective = objective_of(config, special)
    result = depth(
        opened.rack,
        objective,
        split,
        seq_len=config.training.seq_len,
        routes=routes_of(opened.rack, config, special),
        batch_size=batch_size or config.evaluation.batch_size or rows,
        windows=batches * rows,
        passes=config.evaluation.passes if masks(config) else 1,
        packing=config.data.packing,
        doc_mask=config.data.doc_mask,
        pad_id=opened.tokenizer.pad_id,
        progress=progress,
    )
    label = label_of(config)
    protocol = {
        "figures": "depth",
        "objective": objective.name,
        "label": label,
        "unit": unit_of(objective, label),
        "data": data,
        "split": split.name,
        "windows": result.windows,
        "seq_len": result.seq_len,
        "passes": result.passes,
        "dtype": "float32",
        "sums": "float64",
    }
    record = {**record_of(opened.folder.path, opened, protocol), "views": result.to_dict()["views"]}
    return {name: finite(value) for name, value in record.items()}


def unit_of(objective: object, label: str) -> str:
    """Of the losses."""
    if getattr(objective, "predict", "token") == "noise":
        return "squared error"
    return "nats per hidden token" if label == "pseudo" else "nats per token"


def write_depth(opened: OpenRun, record: dict[str, Any]) -> None:
    """Put the diagnostics into the run folder, whole or not at all."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    ops.replace_text(opened.folder.depth, text + "\n")
