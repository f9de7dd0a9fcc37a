"""Trackio: a SQLite file in the run folder, read by `trackio show`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.storage import ops
from stackwise.tracking.sinks.append_only import AppendOnly
from stackwise.tracking.sinks.rows import Row

if TYPE_CHECKING:
    from trackio.run import Run

__all__ = ["Trackio"]

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Where the library would send figures instead; `trackio sync` does so afterwards."""


class Trackio(AppendOnly):
    """One Trackio run per run folder, continued where its file ends. Nothing is sent anywhere.

    The file is written by the library, outside of `storage.ops`, in threads of its own; what those cannot write they
    say themselves.
    """

    name = "trackio"

    def __init__(self, folder: Path, project: str, run_id: str) -> None:
        super().__init__()
        self.folder, self.project, self.run_id = folder, project, run_id
        self._run: Run | None = None

    def open(self, events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
        ops.make_dir(self.folder)
        with _at_home(self.folder):
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            _point_at(self.folder)
            self._run = trackio.init(
                self.project,
                name=self.run_id,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            known = SQLiteStorage.get_max_step_for_run(self.project, self.run_id, run_id=self._run.id)
        self.replay(events, -1 if known is None else known)

    def hand_over(self, row: Row) -> None:
        import trackio

        assert self._run is not None
        texts = {name: trackio.Markdown(text) for name, text in row.texts.items()}
        self._run.log({"tokens": row.tokens, "flops": row.flops, **row.scalars, **texts}, step=row.step)

    def close(self) -> None:
        if self._run is not None:
            import trackio

            self._run = None
            with contextlib.redirect_stdout(io.StringIO()):
                trackio.finish()  # of the run alone the library would speak again at the end of the process


@contextlib.contextmanager
def _at_home(folder: Path) -> Iterator[None]:
    """The library's folder, no server, and none of the lines that it prints about itself."""
    before = {name: os.environ.pop(name, None) for name in ("TRACKIO_DIR", *_REMOTE)}
    os.environ["TRACKIO_DIR"] = str(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.environ.pop("TRACKIO_DIR")
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _point_at(folder: Path) -> None:
    """The library reads TRACKIO_DIR once per process, and a process may train several runs."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            module.TRACKIO_DIR = folder  # type: ignore[attr-defined]
