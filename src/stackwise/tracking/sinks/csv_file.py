"""`metrics.csv`: the lines of steps and evaluations as a table for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stackwise.storage import ops

__all__ = ["COLUMNS", "CsvFile"]

COLUMNS = (
    *(
        "event",
        "time",
        "step",
        "stage",
        "stage_step",
        "when",
        "tokens",
        "flops",
        "seconds",
        "loss",
        "perplexity",
    ),
    *("bits_per_byte", "lr", "grad_norm", "tokens_per_s", "rss_bytes"),
)
"""`event` is step or eval; a column that the other kind has stays empty."""


class CsvFile:
    """Appends a line per step logged and per evaluation; written again from the events where a run is taken up."""

    name = "csv"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log: ops.Log | None = None

    def open(self, events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
        self.rewind(events)

    def emit(self, event: Mapping[str, Any]) -> None:
        if self._log is not None and event["event"] in ("step", "eval"):
            self._log.append(_line([event.get(name) for name in COLUMNS]))

    def rewind(self, events: Sequence[Mapping[str, Any]]) -> None:
        self.close()
        lines = [_line(COLUMNS)]
        lines += [_line([e.get(n) for n in COLUMNS]) for e in events if e["event"] in ("step", "eval")]
        ops.write_atomic(self.path, [b"".join(lines)], kind="text")
        ops.sync_dir(self.path.parent)
        self._log = ops.Log(self.path)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def _line(values: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()
