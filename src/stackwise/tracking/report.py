"""``report.html``: one page about one run, from its folder alone.

The page needs nothing besides itself: no network, no script. The same folder gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from stackwise.storage import ops
from stackwise.tracking.depth_section import depth
from stackwise.tracking.drawing import write_png
from stackwise.tracking.gallery import can_draw
from stackwise.tracking.page import ReportedRun, Section, html_page
from stackwise.tracking.repeat_section import how_to_repeat
from stackwise.tracking.run_sections import curves, header, key_figures, notices, samples
from stackwise.tracking.stage_sections import growths, stages

__all__ = ["SECTIONS", "build_report", "render"]

SECTIONS: tuple[Section, ...] = (
    header,
    notices,
    key_figures,
    stages,
    growths,
    curves,
    depth,
    samples,
    how_to_repeat,
)
"""The parts of the page from top to bottom."""

_FOOTER = (
    "<footer>Written by StackWise from this run's folder. Losses are in nats per token; 1 MB is 10<sup>6</sup> bytes, "
    "1 k is 1000.</footer>"
)


def build_report(run_dir: str | Path, out: Path | None = None) -> Path:
    """Write ``plots/*.png`` and ``report.html`` in a run folder from what the folder holds; return the page's path.

    ``out``: the page goes there, and nothing is written in the run folder.

    Works on a finished, stopped or still running run. Lines of ``metrics.jsonl`` that cannot be read are named on the
    page. Without matplotlib the page is written without plots, says how to install it, and a warning is issued.
    Raises ``RunFolderError`` when the folder holds no run and ``FileNotFoundError`` when it has no ``metrics.jsonl``.
    """
    from stackwise.tracking.plots import available_plots

    reported = ReportedRun.read(run_dir)
    if out is None and can_draw():
        for plot in available_plots(reported.history):
            write_png(plot, reported.folder.plots)
    page = out or reported.folder.report
    ops.replace_text(page, render(reported))
    return page


def render(reported: ReportedRun) -> str:
    """The page about a run; nothing is written."""
    parts = [section(reported) for section in SECTIONS]
    return html_page(reported.name, "\n".join([*(part for part in parts if part), _FOOTER]))
