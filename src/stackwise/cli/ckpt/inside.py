"""`stackwise ckpt diff`, `du` and `cat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.ckpt.common import CommitName, open_store
from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Run
from stackwise.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from stackwise.checkpoint.manifest import Commit


def diff(
    run: Run,
    before: CommitName,
    after: CommitName,
    other: Annotated[
        str | None, typer.Option("--with", metavar="RUN", help="The run that the second commit belongs to.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what differs between two commits: parts and bytes, tensors, and settings.

    Parts are compared by their hashes, so that what is not listed is equal in every bit.

    \b
    Examples:
      stackwise ckpt diff demo stage-01 latest
      stackwise ckpt diff demo latest latest --with warmer
    """
    from stackwise.checkpoint.compare import compare, config_changes
    from stackwise.config.errors import show as text_of
    from stackwise.tracking import units

    _, store = open_store(run)
    store_b = store if other is None else open_store(other)[1]
    a, b = store.find(before), store_b.find(after)
    changes = compare(store, a, b, store_b)
    settings = config_changes(store.meta(a), store_b.meta(b))
    shared = {p.sha256: p.bytes for p in a.parts.values()}.keys() & {p.sha256 for p in b.parts.values()}
    equal = sum({p.sha256: p.bytes for p in a.parts.values() if p.sha256 in shared}.values())
    if as_json:
        print_json(
            {
                "before": a.id,
                "after": b.id,
                "steps": b.step - a.step,
                "bytes_equal": equal,
                "parts": [
                    {**vars(change), "tensors": [vars(tensor) for tensor in change.tensors]}
                    for change in changes
                ],
                "config": None
                if settings is None
                else [{"key": key, "before": x, "after": y} for key, x, y in settings],
            }
        )
        return
    print(f"{a.id} -> {b.id}: {b.step - a.step:+,} steps, {units.size(equal)} equal")
    rows = [
        [
            change.name,
            change.state,
            units.size(change.bytes_before),
            units.size(change.bytes_after),
            f"{len(change.tensors)}/{change.n_tensors}",
            _largest([t.distance for t in change.tensors if t.distance is not None]),
        ]
        for change in changes
    ]
    if rows:
        heads = ["part", "text:state", "before", "after", "tensors", "largest change"]
        print_table("", heads, rows, caption="Parts that are not listed are equal in every bit.")
    else:
        print("All parts are equal in every bit.")
    if settings is None:
        note("at least one of the commits records no settings, so those are not compared")
    elif settings:
        print_table(
            "Settings",
            ["key", "text:before", "text:after"],
            [[k, text_of(x), text_of(y)] for k, x, y in settings],
        )
    else:
        print("All settings that decide the course are equal.")


def _largest(distances: list[float]) -> str:
    unequal = [d for d in distances if d != d]
    return "nan" if unequal else f"{max(distances):.3g}" if distances else "-"


def du(run: Run, as_json: Json = False) -> None:
    """Show what a store takes on the disk: by stack and kind of part, by commit, and what no commit needs.

    \b
    alone        bytes that only this commit needs: what its deletion would free
    unreferenced left by an interrupted save; the next prune removes it
    quarantine   damaged files that `stackwise ckpt repair` has set aside; remove them by hand when they are not needed

    \b
    Examples:
      stackwise ckpt du demo
      stackwise ckpt du demo --json
    """
    from stackwise.checkpoint.upkeep import usage
    from stackwise.tracking import units

    _, store = open_store(run)
    used = usage(store)
    if as_json:
        print_json({**vars(used), "total": used.total})
        return
    kinds = sorted({name.rpartition("/")[2] for name in used.parts})
    owners = list(dict.fromkeys(name.rpartition("/")[0] for name in used.parts))
    rows = [
        [owner, *(units.size(used.parts.get(f"{owner}/{kind}", 0)) for kind in kinds)] for owner in owners
    ]
    totals = [
        sum(size for name, size in used.parts.items() if name.rpartition("/")[2] == kind) for kind in kinds
    ]
    print_table("By part, over all commits", ["part", *kinds], [*rows, ["all", *map(units.size, totals)]])
    commits = [[name, units.size(used.new[name]), units.size(used.unique[name])] for name in used.new]
    print_table("By commit", ["commit", "new", "alone"], commits)
    for name in ("objects", "manifests", "unreferenced", "held", "quarantine", "temporary", "total"):
        size = getattr(used, name)
        if size or name in ("objects", "total"):
            print(f"  {name:<12} {units.size(size)}")


def cat(
    run: Run,
    commit: CommitName,
    tensor: Annotated[str, typer.Argument(metavar="TENSOR", help="Its name; `show --tensors` lists them.")],
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="PART", help="Where several parts have a tensor of this name."),
    ] = None,
    values: Annotated[int, typer.Option("--values", metavar="N", min=0, help="How many values to show.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write it to a safetensors file instead."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one tensor of a commit: shape, statistics and first values, or write it to a file.

    \b
    Examples:
      stackwise ckpt cat demo latest embedding.weight
      stackwise ckpt cat demo stage-01 norm.weight --values 32
      stackwise ckpt cat demo best embedding.weight --out embedding.safetensors
    """
    from stackwise.checkpoint.compare import facts_of

    _, store = open_store(run)
    chosen = store.find(commit)
    name = _part_with(chosen, tensor, part)
    value = store.load(chosen, name)[tensor]
    facts = {"commit": chosen.id, "part": name, "tensor": tensor, **facts_of(value, values)}
    if out is not None:
        from stackwise.model.files import save_tensors

        if out.exists():
            raise UsageError(f"{out} exists already; choose another file, or remove it")
        save_tensors(out, {tensor: value}, {"commit": chosen.id, "part": name})
        facts["file"] = str(out)
    if as_json:
        print_json(facts)
        return
    if out is not None:
        print(out)
        return
    for key, item in facts.items():
        print(f"{key:<9} {f'{item:.6g}' if isinstance(item, float) else item}")


def _part_with(commit: Commit, tensor: str, part: str | None) -> str:
    """The part that holds a tensor; none or several are a UsageError."""
    from stackwise.config.errors import did_you_mean

    named: dict[str, list[str]] = {}
    for entry in commit.parts.values():
        for info in entry.tensors:
            named.setdefault(info.name, []).append(entry.name)
    holders = named.get(tensor, [])
    if not holders:
        hint = did_you_mean(tensor, named) or "`stackwise ckpt show RUN COMMIT --tensors` lists them"
        raise UsageError(f"commit {commit.id} has no tensor {tensor!r}; {hint}")
    if part is not None and part not in holders:
        raise UsageError(
            f"part {part!r} of {commit.id} has no tensor {tensor!r}; it is in {', '.join(holders)}"
        )
    if part is None and len(holders) > 1:
        raise UsageError(
            f"several parts have a tensor {tensor!r}: name one with --part: {', '.join(holders)}"
        )
    return part or holders[0]
