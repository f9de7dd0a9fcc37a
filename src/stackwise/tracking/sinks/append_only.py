"""What trackers have in common that keep whatever they were once given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stackwise.tracking.sinks.rows import Row, Rows

__all__ = ["AppendOnly"]


class AppendOnly:
    """Hands each step over once: rows up to the last step that the tracker has are left out.

    Where a run went back to an earlier commit, its curves in the tracker go on behind the last step they have.
    """

    def __init__(self) -> None:
        self._rows = Rows()
        self._has = -1  # steps up to here were handed over before the last opening or rewind
        self._newest = -1

    def hand_over(self, row: Row) -> None:
        raise NotImplementedError

    def replay(self, events: Sequence[Mapping[str, Any]], has: int) -> None:
        """Hand over what the tracker lacks; it has the steps up to `has`, -1 where it is new."""
        self._has = self._newest = has
        self.rewind(events)

    def rewind(self, events: Sequence[Mapping[str, Any]]) -> None:
        self._rows, self._has = Rows(), self._newest
        for event in events:
            self.emit(event)

    def emit(self, event: Mapping[str, Any]) -> None:
        row = self._rows.of(event)
        if row is not None and row.step > self._has:
            self.hand_over(row)
            self._newest = row.step
