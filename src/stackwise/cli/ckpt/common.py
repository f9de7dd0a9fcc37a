"""What the verbs of `stackwise ckpt` share: their arguments, and the store behind RUN."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import find_run
from stackwise.cli.output import note

if TYPE_CHECKING:
    from stackwise.checkpoint.retention import Retention
    from stackwise.checkpoint.store import Store
    from stackwise.tracking.folder import RunFolder

CommitName = Annotated[
    str,
    typer.Argument(
        metavar="COMMIT", help="latest, best, a pin such as stage-02, step:120, or the beginning of an id."
    ),
]


def open_store(run: str) -> tuple[RunFolder, Store]:
    """The folder and the store of RUN. A wrong name is a UsageError, a run without commits too."""
    path = find_run(run)
    from stackwise.checkpoint.store import Store
    from stackwise.tracking.folder import RunFolder

    folder = RunFolder.open(path)
    if not folder.store.is_dir():
        raise UsageError(f"{folder.path} has no commit yet; train it first: stackwise train {folder.config}")
    return folder, Store(folder.store)


def retention_of(folder: RunFolder) -> Retention:
    """What the run's configuration asks for."""
    from stackwise.config.root import StackWiseConfig
    from stackwise.training import resume

    return resume.retention_of(StackWiseConfig.from_yaml(folder.config))


def date(seconds: float | None) -> str:
    return "-" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def scores_of(store: Store) -> dict[str, float]:
    """Validation loss by commit; a damaged table is noted, and hides nothing else."""
    from stackwise.checkpoint.errors import CheckpointError

    try:
        return store.scores()
    except CheckpointError as error:
        note(str(error))
        return {}
