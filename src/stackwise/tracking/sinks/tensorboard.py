"""TensorBoard: event files in the run folder, read by `tensorboard --logdir`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config.document import dump
from stackwise.storage import ops
from stackwise.tracking.sinks.rows import Rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]

_OTHER_AXES = ("train/loss", "validation/loss")
"""Drawn over tokens and GFLOP too: TensorBoard has one axis, whole numbers, which are steps for all else."""


class TensorBoard:
    """Writes the folder anew from the events where a run is taken up, so that no step is in it twice.

    The files are written by the library, outside of `storage.ops`: nothing is ever read back from them.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._rows = Rows()
        self._config: Mapping[str, Any] = {}

    def open(self, events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
        self._config = config
        self.rewind(events)

    def rewind(self, events: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        ops.remove_tree(self.folder)
        self._rows = Rows()
        self._writer = SummaryWriter(str(self.folder), flush_secs=10)
        self._text("config", dump(dict(self._config)), 0, None)
        for event in events:
            self.emit(event)

    def emit(self, event: Mapping[str, Any]) -> None:
        writer, row = self._writer, self._rows.of(event)
        if row is None or writer is None:
            return
        for name, value in row.scalars.items():
            writer.add_scalar(name, value, row.step, walltime=row.time)
            if name in _OTHER_AXES:
                writer.add_scalar(f"{name} by tokens", value, row.tokens, walltime=row.time)
                writer.add_scalar(f"{name} by GFLOP", value, math.floor(row.flops / 1e9), walltime=row.time)
        for name, text in row.texts.items():
            self._text(name, text, row.step, row.time)
        if event["event"] in ("stage_end", "run_end"):
            writer.flush()

    def _text(self, name: str, text: str, step: int, time: float | None) -> None:
        """TensorBoard reads Markdown, in which an indented block is shown as it is."""
        assert self._writer is not None
        block = "\n".join("    " + line for line in text.split("\n"))
        self._writer.add_text(name, block, step, walltime=time)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
