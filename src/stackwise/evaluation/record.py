"""A result that can be told from all others: which weights, tokenizer, data, protocol and versions it is of."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from stackwise.storage import ops
from stackwise.tracking.environment import package_version
from stackwise.training.stored import OpenRun


def record_of(path: Path, opened: OpenRun, protocol: dict[str, Any]) -> dict[str, Any]:
    """What every result of a run begins with, JSON-able; its figures are added by whoever measures.

    `commit` names the weights, `commit_sha256` pins all bytes of them, `tokenizer` is the hash of the spelling; `protocol`
    says how the figures were computed.
    """
    return {
        "run": str(path),
        "commit": opened.commit.id,
        "commit_sha256": opened.commit.sha256,
        "step": opened.commit.step,
        "tokenizer": opened.tokenizer.hash,
        "protocol": protocol,
        "versions": {
            "stackwise": package_version("stackwise"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def make_ready(folder: Path) -> None:
    """Make the folder that a record will go to, before it is measured. OSError where it cannot be written."""
    ops.make_dir(folder)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def finite(value: Any) -> Any:
    """The same, null where a figure is no finite number: JSON knows neither infinity nor NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def keep(folder: Path, record: dict[str, Any], asked: object = ()) -> Path:
    """The file in `folder` that now holds a record; its name tells run, commit and what was asked.

    The question is the protocol and `asked`, such as the hashes of tasks or of a text: the same question to the same
    commit replaces its file, another one has a file of its own. The folder is there (`make_ready`).
    """
    question = json.dumps([record["protocol"], asked], sort_keys=True)
    digest = hashlib.sha256(question.encode()).hexdigest()[:8]
    path = folder / f"{Path(record['run']).name}-{record['commit']}-{digest}.json"
    ops.replace_text(path, json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n")
    return path
