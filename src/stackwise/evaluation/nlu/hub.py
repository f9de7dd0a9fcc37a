"""Tasks of GLUE from the Hugging Face hub, through the package datasets."""

from __future__ import annotations

from typing import Any

from stackwise.data.errors import DataError
from stackwise.evaluation.nlu.recipes import KNOWN
from stackwise.evaluation.nlu.tasks import Task, made_task

REPOSITORY = "nyu-mll/glue"


def hub_task(name: str, split: str = "dev") -> Task:
    """A task of GLUE by its name; its own test rows have no public labels, so `split` is "dev" or "holdout".

    DataError where the package is missing or the rows cannot be fetched.
    """
    known = KNOWN[name]
    if split == "test":
        raise DataError("the labels of GLUE's test rows are not public", where=name, hint="score --split dev")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} is a task of GLUE on the Hugging Face hub, which needs the package datasets",
            hint="pip install 'stackwise[hf]', or give --data FOLDER with a folder of this name",
        ) from error
    read, hashes = [], {}
    for part in ["train"] if split == "holdout" else ["train", known.dev]:
        try:
            rows: Any = datasets.load_dataset(REPOSITORY, name, split=part)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the rows {part!r} of {REPOSITORY}, {name}, cannot be fetched ({str(error).splitlines()[0]})",
                hint="check the network, or give --data FOLDER with a folder of this name",
            ) from error
        read.append((f"{REPOSITORY} {name} {part}", [_row(row, name) for row in rows]))
        hashes[f"{REPOSITORY}/{name}/{part}"] = str(rows._fingerprint)
    return made_task(name, read, split, hashes)


def _row(row: dict[str, Any], name: str) -> dict[str, Any]:
    """A row of the hub with the keys of a local file."""
    known = KNOWN[name]
    keys = ("sentence1", "sentence2") if len(known.columns) == 2 else ("sentence",)
    texts = {key: row[column] for key, column in zip(keys, known.columns, strict=True)}
    return {**texts, known.target: row["label"]}
