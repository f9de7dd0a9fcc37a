"""`stackwise report`."""

from __future__ import annotations

from stackwise.cli.options import Run, find_run


def report(run: Run) -> None:
    """Build the plots and the report of a run again, from its folder alone.

    Works on a finished, stopped or still running run.

    \b
    Examples:
      stackwise report runs/demo
    """
    path = find_run(run)
    from stackwise.tracking.report import build_report

    print(build_report(path))
