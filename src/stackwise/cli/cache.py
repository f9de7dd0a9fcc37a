"""`stackwise cache`: list, check and clear the stored outputs of frozen trunks."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json
from stackwise.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from stackwise.trunk.listing import StoreInfo

app = typer.Typer(no_args_is_help=True, short_help="List, check and clear stored trunk outputs.")

CACHE = Path("cache")
"""The default of `training.progressive.cache_dir`."""

Directory = Annotated[
    Path, typer.Argument(metavar="[DIR]", help="Where the stores are: training.progressive.cache_dir.")
]
Stores = Annotated[
    list[str] | None, typer.Option("--store", metavar="NAME", help="Only this one; may be repeated.")
]


@app.callback()
def cache() -> None:
    """List, check and clear the stored outputs of frozen trunks.

    A run that trains a stack on a frozen trunk may keep what the trunk gives for each sample. What it leaves behind
    can be removed at any time: it is computed again where it is needed.

    \b
    Examples:
      stackwise cache ls
      stackwise cache verify my-cache
      stackwise cache clear --store b004-0123456789abcdef01234567
    """


@app.command("ls")
def ls(directory: Directory = CACHE, as_json: Json = False) -> None:
    """List the stores in a folder, the one used longest ago first.

    \b
    Examples:
      stackwise cache ls
      stackwise cache ls my-cache --json
    """
    found = _stores(directory)
    if as_json:
        print_json([_facts(info) for info in found])
        return
    if not found:
        print(f"No stores in {directory}.")
        return
    from stackwise.tracking import units

    rows = []
    for info in found:
        facts, header = _facts(info), info.header
        rows.append(
            [
                info.name,
                "-" if header is None else f"block {facts['boundary']}",
                "-" if header is None else f"{info.entries:,}/{header.n_samples * header.draws:,}",
                units.size(info.bytes),
                "damaged" if header is None else header.dtype,
                units.duration(max(0.0, time.time() - info.used)),
                str(facts["key"].get("prefix", "-"))[:8],
                str(facts["key"].get("data", "-"))[:8],
            ]
        )
    heads = ["store", "after", "samples", "size", "text:format", "last used", "text:trunk", "text:data"]
    print_table("", heads, rows)
    for info in found:
        if info.damage:
            note(info.damage)


@app.command("verify")
def verify(directory: Directory = CACHE, stores: Stores = None, as_json: Json = False) -> None:
    """Read every stored entry and compare it with its checksum; exit code 3 when one is damaged.

    \b
    Examples:
      stackwise cache verify
      stackwise cache verify my-cache --store b004-0123456789abcdef01234567
    """
    from stackwise.trunk.errors import CacheError
    from stackwise.trunk.listing import verify_store

    results: list[dict[str, Any]] = []
    for info in _chosen(directory, stores):
        try:
            whole, damage = (0, [info.damage]) if info.damage else verify_store(info.path)
        except CacheError as error:
            whole, damage = 0, [str(error)]
        results.append({"store": info.name, "entries": info.entries, "whole": whole, "damage": damage})
    if as_json:
        print_json(results)
    else:
        for result in results:
            print(f"{result['store']}: {result['whole']:,} of {result['entries']:,} entries are whole")
        if not results:
            print(f"No stores in {directory}.")
    found = [line for result in results for line in result["damage"]]
    if found:
        raise CacheError(
            "damaged: " + "\n  ".join(found) + "\nWhat is damaged is not used and is computed again; "
            f"`stackwise cache clear {directory} --store NAME` removes a store"
        )


@app.command("clear")
def clear(
    directory: Directory = CACHE,
    stores: Stores = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove stores: those named, or all of a folder. One that a run is writing to stays.

    \b
    Examples:
      stackwise cache clear --yes
      stackwise cache clear my-cache --store b004-0123456789abcdef01234567
    """
    from stackwise.tracking import units
    from stackwise.trunk.errors import CacheInUseError
    from stackwise.trunk.listing import remove_store

    chosen = _chosen(directory, stores)
    if chosen and not stores and not yes:
        size = units.size(sum(info.bytes for info in chosen))
        if not sys.stdin.isatty():
            raise UsageError(
                f"removing all {len(chosen)} stores of {directory} ({size}) needs a yes, and there is no terminal "
                "to ask; add --yes, or name them with --store"
            )
        if not typer.confirm(f"Remove all {len(chosen)} stores of {directory} ({size})?"):
            print("Nothing was removed.")
            return
    freed, removed, busy = 0, [], None
    for info in chosen:
        try:
            freed += remove_store(info.path)
            removed.append(info.name)
        except CacheInUseError as error:
            busy = error
    if as_json:
        print_json({"removed": removed, "bytes": freed})
    else:
        count = f"{len(removed)} store" + ("" if len(removed) == 1 else "s")
        print(f"removed {count}, {freed:,} bytes freed")
    if busy is not None:
        raise busy


def _stores(directory: Path) -> list[StoreInfo]:
    from stackwise.trunk.listing import list_stores

    if not directory.is_dir() and (directory != CACHE or directory.exists()):
        raise UsageError(f"{directory} is not a folder; it is the value of training.progressive.cache_dir")
    return list_stores(directory)


def _chosen(directory: Path, names: list[str] | None) -> list[StoreInfo]:
    """The stores with these names; without names all of them. A wrong name is a UsageError."""
    found = {info.name: info for info in _stores(directory)}
    if not names:
        return list(found.values())
    from stackwise.config.errors import did_you_mean

    for name in names:
        if name not in found:
            hint = did_you_mean(name, found) or f"there are {len(found)}: `stackwise cache ls {directory}`"
            raise UsageError(f"there is no store {name!r} in {directory}; {hint}")
    return [found[name] for name in dict.fromkeys(names)]


def _facts(info: StoreInfo) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "store": info.name,
        "path": str(info.path),
        "bytes": info.bytes,
        "last_used": info.used,
        "entries": info.entries,
        "damage": info.damage,
        "key": {},
    }
    if (header := info.header) is not None:
        facts |= {
            "key": header.key,
            "boundary": header.key.get("boundary", "-"),
            "shape": list(header.shape),
            "samples": header.n_samples,
            "draws": header.draws,
            "dtype": header.dtype,
            "created": header.created,
        }
    return facts
