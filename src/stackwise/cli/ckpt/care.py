"""`stackwise ckpt verify`, `prune`, `pin`, `unpin` and `repair`."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.ckpt.common import CommitName, open_store, retention_of
from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Run
from stackwise.cli.output import next_steps, note, print_json, print_table

if TYPE_CHECKING:
    from stackwise.checkpoint.store import Store
    from stackwise.checkpoint.upkeep import Damage

PinName = Annotated[str, typer.Argument(metavar="NAME", help="A letter, then letters, digits and . _ -")]


def verify(
    run: Run,
    commit: CommitName = "latest",
    everything: Annotated[bool, typer.Option("--all", help="All commits.")] = False,
    subset: Annotated[
        str | None,
        typer.Option("--subset", metavar="10%", help="A share of all objects, drawn at random."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a commit and compare every byte with the hashes it was stored under; exit code 3 when one is damaged.

    Names the damaged files and all commits that they hurt. What was read whole is remembered for `ckpt ls`, and the
    last verified commit is never pruned.

    \b
    Examples:
      stackwise ckpt verify demo
      stackwise ckpt verify demo stage-02
      stackwise ckpt verify demo --all
      stackwise ckpt verify demo --subset 10%
    """
    from stackwise.checkpoint.errors import CheckpointError
    from stackwise.checkpoint.upkeep import examine
    from stackwise.tracking import units

    share = 1.0 if subset is None else _share(subset)
    if everything and subset is not None:
        raise UsageError("--all and --subset exclude each other: --subset draws from all commits")
    if commit != "latest" and (everything or subset is not None):
        raise UsageError(f"{commit!r} names one commit; leave it out for --all or --subset")
    _, store = open_store(run)
    if everything or subset is not None:
        found = examine(store, share=share)
    else:
        newest = store.commits()[-1:] if commit == "latest" else [store.find(commit)]
        found = examine(store, newest)
    _remember(store, found.whole)
    if as_json:
        print_json({**vars(found), "damage": [_damage_facts(damage) for damage in found.damage]})
    else:
        whole = len(found.whole)
        print(
            f"{found.objects:,} objects read, {units.size(found.bytes)}: "
            f"{whole:,} commit{'' if whole == 1 else 's'} whole, {len(found.damage):,} damaged files"
        )
    if found.damage:
        raise CheckpointError(
            "\n  ".join(["damaged:", *map(_damage_line, found.damage)])
            + f"\nTo set this aside and see what is left:\n  {store.repair_command}"
        )


def _share(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text)
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--subset {text!r} is no share; it is above 0 % and at most 100 %, such as 10%")
    return share


def _remember(store: Store, whole: tuple[str, ...]) -> None:
    """Note when commits were verified, unless a run that is writing there has the lock."""
    from stackwise.checkpoint.errors import LockError
    from stackwise.checkpoint.upkeep import remember

    try:
        with store.lock():
            remember(store, whole)
    except LockError:
        note("the run is being written to, so the date of this check is not remembered")


def _damage_facts(damage: Damage) -> dict[str, Any]:
    return {**vars(damage), "path": str(damage.path)}


def _damage_line(damage: Damage) -> str:
    parts = f" ({', '.join(damage.parts)})" if damage.parts else ""
    hurt = f"; hurts {', '.join(damage.commits)}" if damage.commits else ""
    return f"{damage.path}{parts}: {damage.what}{hurt}"


def prune(
    run: Run,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", metavar="N", min=1, help="The newest N commits.")
    ] = None,
    keep_best: Annotated[
        int | None,
        typer.Option("--keep-best", metavar="K", min=0, help="The K of the lowest validation losses."),
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option("--keep-every", metavar="M", min=1, help="Those whose step is a multiple of M."),
    ] = None,
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages/--drop-stages", help="The stage ends (stage-01, ...).")
    ] = True,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Carry it out.")] = False,
    as_json: Json = False,
) -> None:
    """Show which commits and objects could go; with --yes delete them.

    What is not given here is as the run's configuration says (checkpoint.keep_last, keep_best, keep_every). The newest
    commit, those pinned by hand and the last verified one always stay. Nothing is deleted when a manifest or a pin is
    damaged, or when the newest commit is not whole.

    \b
    Examples:
      stackwise ckpt prune demo
      stackwise ckpt prune demo --keep-last 1 --keep-best 2 --yes
      stackwise ckpt prune demo --keep-last 1 --drop-stages
    """
    from stackwise.tracking import units

    folder, store = open_store(run)
    retention = retention_of(folder)
    given = {"last": keep_last, "best": keep_best, "every": keep_every}
    asked = {name: value for name, value in given.items() if value is not None}
    retention = replace(retention, **asked, stages=keep_stages)
    pruned = store.prune(retention, dry_run=not yes)
    if as_json:
        print_json({**vars(pruned), "carried_out": yes})
        return
    rows = [[name, "deleted" if yes else "would go"] for name in pruned.commits]
    rows += [[name, "kept: " + ", ".join(why)] for name, why in pruned.kept.items()]
    print_table("", ["commit", "text:fate"], sorted(rows))
    verb = "deleted" if yes else "to delete"
    print(
        f"{len(pruned.commits):,} commits and {pruned.objects:,} objects {verb}, {units.size(pruned.bytes)}"
    )
    if not yes and (pruned.commits or pruned.objects):
        options = [f"--keep-{name}={value}" for name, value in asked.items()]
        options += [] if keep_stages else ["--drop-stages"]
        next_steps(carry_it_out=shlex.join(["stackwise", "ckpt", "prune", run, *options, "--yes"]))


def pin(run: Run, commit: CommitName, name: PinName, as_json: Json = False) -> None:
    """Give a commit a name under which it is kept, whatever is pruned, until `ckpt unpin`.

    \b
    Examples:
      stackwise ckpt pin demo best release
      stackwise generate demo --prompt 'Once'
      stackwise ckpt unpin demo release
    """
    _, store = open_store(run)
    chosen = store.find(commit)
    store.pin(name, chosen)
    if as_json:
        print_json({"pin": name, "commit": chosen.id})
    else:
        print(f"{name} is {chosen.id}")


def unpin(run: Run, name: PinName, as_json: Json = False) -> None:
    """Remove a pin that was made by hand. The commit stays until something prunes it.

    \b
    Examples:
      stackwise ckpt pin demo latest release
      stackwise ckpt unpin demo release
    """
    _, store = open_store(run)
    held = store.unpin(name)
    if as_json:
        print_json({"pin": name, "commit": held})
    else:
        print(f"{name} was {held}")


def repair(run: Run, as_json: Json = False) -> None:
    """Set damaged files aside, take back what is whole again, and make the small reference files anew.

    Reads everything. A damaged object goes to RUN/store/quarantine with the manifests of all commits that it hurts; a
    damaged manifest or pin goes alone. Nothing is deleted and no object is changed: put a lost file back from a copy, and
    `repair` takes its commits back. Exit code 3 when no whole commit is left.

    \b
    Examples:
      stackwise ckpt repair demo
    """
    from stackwise.checkpoint.errors import CheckpointError
    from stackwise.training.repair import repair_run

    folder, store = open_store(run)
    done = repair_run(folder)
    if as_json:
        print_json({**vars(done), "moved": [_damage_facts(damage) for damage in done.moved]})
    else:
        for damage in done.moved:
            print(f"set aside: {_damage_line(damage)}")
        for name in done.restored:
            print(f"taken back: {name}")
        for name in done.lost:
            print(f"in quarantine: {name}")
        for name in done.whole:
            print(f"whole: {name}")
    if not done.whole:
        raise CheckpointError(
            f"{store.root} has no whole commit. What is in {store.quarantine} can be taken back once its missing "
            "files are restored from a copy; or train anew with checkpoint.overwrite=true, which deletes it"
        )
