"""`stackwise compare`: several configs trained for the same compute, and what came of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stackwise.cli.compare_entries import entries_of
from stackwise.cli.compare_runs import Race
from stackwise.cli.errors import UsageError
from stackwise.cli.groups import print_differences, print_groups
from stackwise.cli.options import RUNS, Json, Threads, complete_config
from stackwise.cli.output import note, print_json, print_table
from stackwise.cli.train import choose_sinks

if TYPE_CHECKING:
    from stackwise.planning.budget import Axis
    from stackwise.planning.contest import Contestant
    from stackwise.planning.scaling import Fit
    from stackwise.tracking.groups import RunGroup

_OFF = 0.02
"""Share of the budget from which a run that costs more or less is named."""
PAGE = "comparison.html"


def compare(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...",
            help="YAML files or presets; in quotes with overrides of their own, 'CONFIG KEY=VALUE ...'. A KEY=VALUE "
            "outside of quotes is for all.",
            autocompletion=complete_config,
        ),
    ],
    flops: Annotated[
        str | None,
        typer.Option(
            "--flops", metavar="X,...", help="Budget of each run in FLOP; several of them fit a law L(C)."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", metavar="N,...", help="Budget of each run in tokens, in place of FLOP."),
    ] = None,
    match: Annotated[
        Literal["flops", "tokens"] | None,
        typer.Option(
            "--match",
            help="What the runs have in common where no budget is given: that of the first config as it stands; by "
            "default flops.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=V,V,...",
            help="Train each config in several sizes, and fit a law L(N). Several: values at the same place belong "
            "together.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, metavar="N", help="Runs of each config, with seeds one apart.")
    ] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run folders and of the page.")
    ] = RUNS / "compare",
    plain: Annotated[
        bool, typer.Option("--plain", help="One line per event, as in a pipe; no live display.")
    ] = False,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Train several configs on the same data for the same compute, and compare them on one page.

    Each config trains for as many steps as the budget pays for, counted before it runs; everything else stays as its
    config says. Held-out text, tokenizer and evaluation must be the same. Runs go to DIR/LABEL-sSEED; those that are
    done are not repeated and an interrupted one continues, so the same command goes on after Ctrl-C, and a config or a
    seed can be added later. The page is DIR/comparison.html.

    \b
    Examples:
      stackwise compare demo 'demo training.progressive.enabled=false' model.tie_embeddings=false --seeds 3
      stackwise compare append.yaml grow.yaml data.path=my.txt --flops 1e13
      stackwise compare 'my.yaml training.run_id=small' 'my.yaml training.run_id=deep model.architecture.n_stacks=8'
      stackwise compare my.yaml --sweep model.d_model=32,64,96,128 --match tokens
      stackwise compare demo 'demo training.progressive.enabled=false' --flops 1e11,3e11,1e12,3e12 --seeds 2
    """
    axis, targets = _budget(flops, tokens, match)
    entries = entries_of(configs, sweep or (), out, len(targets or [0.0]))
    from stackwise.planning.contest import common_ground, fitted
    from stackwise.planning.scaling import fits
    from stackwise.tracking.groups import differences, warnings_about

    ground = common_ground(entries)
    contestants = fitted(entries, ground, axis, targets)
    _announce(contestants, seeds)
    race = Race(out, ground.corpus.tokenizer, entries[0].config.training.seed, seeds)
    race.check(contestants)
    again = _again(configs, flops, tokens, match, sweep, seeds, out)
    failed = race.run(
        contestants, lambda: choose_sinks(as_json, plain), lambda line: print(line, file=sys.stderr), again
    )
    groups = race.groups(contestants)
    laws = fits(contestants, groups)
    page = _page(contestants, groups, laws, seeds, out)
    if as_json:
        print_json(_facts(contestants, groups, laws, page))
    else:
        _show(contestants, groups, laws)
        print_differences(groups, differences(groups))
        for warning in warnings_about(groups):
            note(warning)
        print(f"\nPage  {page}")
    if failed is not None:
        raise failed


def _budget(flops: str | None, tokens: str | None, match: Axis | None) -> tuple[Axis, list[float] | None]:
    given = [(name, text) for name, text in (("flops", flops), ("tokens", tokens)) if text is not None]
    if len(given) + (match is not None) > 1:
        raise UsageError(
            "--flops, --tokens and --match exclude each other: a comparison has one kind of budget"
        )
    if not given:
        return match or "flops", None
    name, text = given[0]
    try:
        targets = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{name} {text!r}: write numbers, such as 1e12 or 1e12,3e12") from None
    if not all(0 < target < float("inf") for target in targets) or len(set(targets)) < len(targets):
        raise UsageError(f"--{name} {text!r}: the numbers must be above 0, and different")
    return ("flops" if name == "flops" else "tokens"), targets


def _again(
    configs: Sequence[str],
    flops: str | None,
    tokens: str | None,
    match: str | None,
    sweep: Sequence[str] | None,
    seeds: int,
    out: Path,
) -> str:
    """The command line that goes on."""
    given = {"--flops": flops, "--tokens": tokens, "--match": match}
    words = ["stackwise", "compare", *configs]
    words += [word for name, value in given.items() if value is not None for word in (name, value)]
    words += [word for one in sweep or () for word in ("--sweep", one)]
    if seeds > 1:
        words += ["--seeds", str(seeds)]
    return shlex.join([*words, "--out", str(out)])


def _announce(contestants: Sequence[Contestant], seeds: int) -> None:
    """What will be trained, before it is."""
    from stackwise.tracking import units

    show = units.flops if contestants[0].axis == "flops" else units.count
    for one in contestants:
        line = f"{one.name}: {units.steps(one.steps)} steps, {show(one.cost)} of {show(one.target)}"
        print(line + (f", {seeds} seeds" if seeds > 1 else ""), file=sys.stderr)
    for text in dict.fromkeys(text for one in contestants for text in one.config.notes()):
        note(text)


def _budgets(contestants: Sequence[Contestant], groups: Sequence[RunGroup]) -> list[str]:
    """Runs that did not cost what the budget says, by what they counted themselves."""
    found = []
    for one, group in zip(contestants, groups, strict=True):
        cost = group.figures[one.axis]
        if cost is not None and group.status == "done" and abs(cost.mean / one.target - 1) > _OFF:
            found.append(
                f"{one.name} cost {cost.mean / one.target - 1:+.1%} of the budget: its steps are that coarse. A larger "
                "budget, or smaller batches, come nearer"
            )
    return found


def _page(
    contestants: Sequence[Contestant],
    groups: Sequence[RunGroup],
    laws: Sequence[Fit],
    seeds: int,
    out: Path,
) -> Path:
    from stackwise.planning.scaling import scaling_section
    from stackwise.tracking import units
    from stackwise.tracking.group_report import GroupPage, build_group_report

    axis = contestants[0].axis
    show = units.flops if axis == "flops" else (lambda value: f"{units.count(value)} tokens")
    targets = ", ".join(show(target) for target in dict.fromkeys(one.target for one in contestants))
    entries = len(dict.fromkeys(one.entry.label for one in contestants))
    lead = f"{entries} configs · budget of each run {targets} · " + (
        "1 seed" if seeds == 1 else f"{seeds} seeds"
    )
    page = GroupPage("Comparison", lead, _budgets(contestants, groups), [scaling_section(laws)])
    return build_group_report(groups, out / PAGE, page)


def _show(contestants: Sequence[Contestant], groups: Sequence[RunGroup], laws: Sequence[Fit]) -> None:
    print()
    print_groups("The same budget, spent in several ways", groups)
    for text in _budgets(contestants, groups):
        note(text)
    if laws:
        rows = [
            [fit.name, *((fit.law.exponent.text(), fit.law.irreducible.text()) if fit.law else ("-", "-")),
             str(len(fit.points)), fit.problem or "; ".join(fit.law.doubts if fit.law else ())]
            for fit in laws
        ]  # fmt: skip
        print_table(
            "Scaling",
            ["law", "exponent a", "irreducible E", "runs", "text:remarks"],
            rows,
            caption="L(x) = E + A x^-a over compute (C), tokens (D) or parameters (N), in nats per token, with intervals "
            "of 95 %.",
        )


def _facts(
    contestants: Sequence[Contestant], groups: Sequence[RunGroup], laws: Sequence[Fit], page: Path
) -> dict[str, Any]:
    from stackwise.tracking.groups import differences, warnings_about

    return {
        "axis": contestants[0].axis,
        "configs": [
            {"config": one.entry.label, "family": one.entry.family, "budget": one.target, **group.to_dict()}
            for one, group in zip(contestants, groups, strict=True)
        ],
        "laws": [fit.to_dict() for fit in laws],
        "differences": {row.key: row.values for row in differences(groups)},
        "warnings": [*_budgets(contestants, groups), *warnings_about(groups)],
        "page": str(page),
    }
