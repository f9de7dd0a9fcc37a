"""`stackwise merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import complete_run, find_run
from stackwise.cli.output import next_steps


def merge(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Finished runs of independent stacks.", autocompletion=complete_run
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Folder of the run to make.")],
) -> None:
    """Unite stacks that were trained independently.

    The runs have one configuration with `training.progressive.building_mode: independent` and share out the stacks by
    `training.progressive.train_stacks`. The one that trains the stack next to the head trains embedding, norm and head
    with it; the others start from it by `checkpoint.init_from`.

    \b
    Examples:
      stackwise train my.yaml training.run_id=a training.progressive.train_stacks=[1]
      stackwise train my.yaml training.run_id=b training.progressive.train_stacks=[0] checkpoint.init_from=runs/a
      stackwise merge a b -o runs/whole
    """
    if len(runs) < 2:
        raise UsageError("merge takes two runs or more, or there is nothing to unite")
    from stackwise.training.merge import merge as unite

    merged = unite([find_run(run) for run in runs], out)
    for position, path in merged.positions.items():
        print(f"stack {position}  from {path}")
    print(f"\nRun     {merged.folder.path}")
    if merged.goes_on:
        next_steps(tune_it_jointly=f"stackwise train {merged.folder.config} --resume")
    else:
        next_steps(
            measure_it=f"stackwise eval {merged.folder.path}",
            its_stages=f"stackwise runs show {merged.folder.path}",
        )
