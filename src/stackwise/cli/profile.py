"""`stackwise profile`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Config, Json, Overrides, Threads, load_config
from stackwise.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from stackwise.planning.profile import Profile

_TOP = 12
"""Operators in the table; the page and --json have more."""


def profile(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Stage, counted from 1; by default the one that takes the most memory."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="K", help="Steps to time.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the files go; by default profiles/RUN_ID-stage-N."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run a few real steps of one stage: speed, time by part, operators, and bytes planned and measured.

    Stages before it take one step each, so the model has grown as in the run. Nothing of the run is written or
    changed; prepared data is kept as `train` keeps it. Written are profile.html with a picture of the bytes alive
    through a step, bytes.png, profile.json and trace.json.gz for ui.perfetto.dev.

    \b
    Examples:
      stackwise profile demo
      stackwise profile demo --stage 2 --steps 10
      stackwise profile my.yaml training.gradient_checkpointing=true --json
    """
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, {out} is a file")
    if stage is not None and stage < 1:
        raise UsageError(f"--stage counts from 1, got {stage}")
    settings = load_config(config, overrides)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the library of the profiler speaks of itself otherwise
    from stackwise.planning.profile import profile as measure
    from stackwise.planning.profile_page import write_profile

    say = (
        None
        if as_json or not sys.stderr.isatty()
        else lambda message: print(f"{message} ...", file=sys.stderr)
    )
    found = measure(
        settings, None if stage is None else stage - 1, steps=steps, say=say or (lambda message: None)
    )
    folder = out or Path("profiles") / f"{found.run_id}-stage-{found.stage + 1}"
    page = write_profile(found, folder)
    if as_json:
        print_json({**found.to_dict(), "page": str(page)})
        return
    _show(found, page)
    for text in settings.notes():
        note(text)


def _show(found: Profile, page: Path) -> None:
    from stackwise.planning.profile_page import TRACE, part_rows, planned_rows
    from stackwise.tracking import units

    print(
        units.printable(
            f"{found.run_id}, stage {found.stage + 1} of {found.stages} ({found.name}), {found.device} {found.dtype}"
        )
    )
    share = found.flops_per_s / found.peak_rate
    print(
        f"  {units.rate(found.tokens_per_s)}, {units.flops(found.flops_per_s)}/s ({share:.0%} of the device's peak), "
        f"{1000 * found.seconds:.1f} ms a step of {units.steps(found.tokens)} tokens"
    )
    print_table(
        "Memory",
        ["item", "planned", "measured", "measured / planned"],
        planned_rows(found),
        caption="Each item at its most. Most alive at once: all tensors, with what passes on top of the items.",
    )
    print_table("Time by part of a step", ["part", "ms", "share"], part_rows(found))
    print_table(
        "Operators by time of their own, per step",
        ["operator", "calls", "ms", "share"],
        [
            [row.name, f"{row.calls:,.0f}", f"{1000 * row.seconds:.2f}", f"{row.share:.1%}"]
            for row in found.operators[:_TOP]
        ],
    )
    if found.line is None:
        note("training.compile is true, so the bytes inside of blocks were not followed")
    print(f"\nPage    {page}\nTrace   {page.parent / TRACE}")
