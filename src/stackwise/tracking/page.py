"""What every page of a report is made of: the run it is about, the frame of the page, and text made safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Self

from stackwise.tracking import units
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.history import RunHistory
from stackwise.tracking.metrics import MetricsLog, read_metrics

__all__ = ["ReportedRun", "Section", "html_page", "text"]


@dataclass(frozen=True)
class ReportedRun:
    """A run as a report reads it: its folder, its log, and the log put in order."""

    folder: RunFolder
    log: MetricsLog
    history: RunHistory

    @classmethod
    def read(cls, run_dir: str | Path) -> Self:
        """``RunFolderError`` when the folder holds no run, ``FileNotFoundError`` when it has no ``metrics.jsonl``.

        Lines of the log that cannot be read are left out and named in ``log.problems``.
        """
        folder = RunFolder.open(run_dir)
        log = read_metrics(folder.metrics, strict=False)
        return cls(folder, log, RunHistory.from_events(log.events))

    @property
    def name(self) -> str:
        return self.history.run_id or self.folder.path.name


Section = Callable[[ReportedRun], str]
"""A part of the page as HTML, from ``<h2>`` on; "" where the run has nothing for it."""


def html_page(title: str, body: str) -> str:
    """A whole page that needs nothing besides itself. ``title`` is plain text, ``body`` is HTML."""
    style = resources.files("stackwise.tracking").joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)} · StackWise</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def text(content: str) -> str:
    """User text for the page: control characters shown, HTML escaped."""
    return escape(units.printable(content))
