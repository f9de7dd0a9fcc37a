"""A run whose store is damaged: setting the damage aside, and going on from what is whole."""

from __future__ import annotations

from stackwise.checkpoint.errors import CheckpointError, VersionError
from stackwise.checkpoint.store import Store
from stackwise.checkpoint.upkeep import Repaired, repair
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.history import validation_by_commit
from stackwise.tracking.metrics import read_metrics


def repair_run(folder: RunFolder) -> Repaired:
    """`checkpoint.upkeep.repair` for the store of a run, with the validation losses that its metrics know."""
    events = read_metrics(folder.metrics, strict=False).events if folder.metrics.is_file() else []
    return repair(Store(folder.store), validation_by_commit(events))


def fall_back(folder: RunFolder) -> list[str]:
    """Make the newest whole commit of a run the newest, when the newest is damaged; says in sentences what was done.

    Raises CheckpointError when no commit is whole; LockError while another process trains there.
    """
    store = Store(folder.store)
    if not folder.store.is_dir():
        return []
    try:
        newest = store.latest()
        if newest is not None:
            store.verify(newest)
        return []
    except VersionError:
        raise
    except CheckpointError as error:
        reason = str(error).partition("\n")[0]
    done = repair_run(folder)
    if not done.whole:
        raise CheckpointError(f"{reason}\n{store.root} has no whole commit to fall back to")
    return [
        reason,
        *(f"set aside in {store.quarantine}: {damage.path.name}" for damage in done.moved),
        f"falling back to commit {done.whole[-1]}",
    ]


def mend_scores(folder: RunFolder, store: Store) -> list[str]:
    """Make a damaged table of validation losses anew from the metrics, so that it stops no run; says so in a sentence.

    The caller holds the store's lock.
    """
    try:
        store.scores()
        return []
    except CheckpointError:
        events = read_metrics(folder.metrics, strict=False).events if folder.metrics.is_file() else []
        store.refs.write_table("scores", validation_by_commit(events))
        return [f"{store.refs.folder / 'scores'} was damaged; made anew from {folder.metrics.name}"]
