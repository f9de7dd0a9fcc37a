"""Weights & Biases: offline in the run folder unless this machine is logged in."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.tracking.sinks.append_only import AppendOnly
from stackwise.tracking.sinks.rows import Row

if TYPE_CHECKING:
    import wandb

__all__ = ["WandB", "mode"]


def mode() -> str:
    """WANDB_MODE where it is set; else online where a key is at hand (WANDB_API_KEY, ~/.netrc), and offline otherwise."""
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known else "offline"


class WandB(AppendOnly):
    """One W&B run per run folder, continued under its id.

    The files are written by the library, outside of `storage.ops`: nothing but the id, a folder's name, is read of them.
    """

    name = "wandb"

    def __init__(self, folder: Path, project: str, run_id: str, last_step: int) -> None:
        """`last_step`: the last that metrics.jsonl knew of before it was cut for a resume, -1 for none."""
        super().__init__()
        self.folder, self.project, self.run_id, self._last_step = folder, project, run_id, last_step
        self._run: wandb.Run | None = None

    def open(self, events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
        import wandb

        known = _id_in(self.folder)
        chosen: Any = mode()  # the library's own literal, which is not known without it
        self._run = wandb.init(
            dir=str(self.folder.parent),  # the library adds the name wandb itself
            id=known,
            resume="allow" if known is not None and chosen == "online" else None,
            project=self.project,
            name=self.run_id,
            config=dict(config),
            mode=chosen,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self.replay(events, self._last_step if known is not None else -1)

    def hand_over(self, row: Row) -> None:
        assert self._run is not None
        self._run.log({"tokens": row.tokens, "flops": row.flops, **row.scalars, **row.texts}, step=row.step)

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


def _id_in(folder: Path) -> str | None:
    """The id of the W&B run in a folder, whose parts are called (offline-)run-<date>_<time>-<id>."""
    parts = sorted(folder.glob("*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
    return parts[-1].name.rpartition("-")[2] if parts else None
