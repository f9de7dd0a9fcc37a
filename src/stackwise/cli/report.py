"""`stackwise report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Runs, find_runs


def report(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where the page goes; by default report.html in the folder of the run, or comparison.html beside the "
            "first of several.",
        ),
    ] = None,
) -> None:
    """Build the report of a run again, or one page about several, from their folders alone.

    Works on finished, stopped or still running runs. Of one run: plots/ and report.html in its folder, or the page alone
    at --out. Of several: one self-contained page with their figures, their losses over compute, tokens and seconds, their memory, and the
    settings in which they differ.

    \b
    Examples:
      stackwise report runs/demo
      stackwise report demo demo-end-to-end demo-shallow
      stackwise report runs/a runs/b --out a-and-b.html
    """
    paths = find_runs(runs)
    if out is not None and out.is_dir():
        raise UsageError(f"--out must be a file, {out} is a folder; {out / 'report.html'} would do")
    if len(paths) == 1:
        from stackwise.tracking.report import build_report

        print(build_report(paths[0], out))
        return
    from stackwise.tracking.group_report import GroupPage, build_group_report
    from stackwise.tracking.groups import labelled
    from stackwise.tracking.page import ReportedRun

    groups = labelled(ReportedRun.read(path) for path in paths)
    target = out or paths[0].parent / "comparison.html"
    print(build_group_report(groups, target, GroupPage(f"{len(groups)} runs")))
