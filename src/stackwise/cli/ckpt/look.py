"""`stackwise ckpt ls` and `show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.ckpt.common import CommitName, date, open_store, retention_of, scores_of
from stackwise.cli.options import Json, Run
from stackwise.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from stackwise.checkpoint.manifest import Commit
    from stackwise.checkpoint.store import Store


def ls(run: Run, as_json: Json = False) -> None:
    """List the commits of a run, oldest first: what they cost, and why they are kept.

    \b
    new        bytes that the commit added to the disk
    shared     bytes that were there already
    validation loss of the evaluation at the step of the save, in nats per token; * the best
    kept       why the next prune leaves it; - it goes
    verified   when `stackwise ckpt verify` last read all of it and found it whole

    \b
    Examples:
      stackwise ckpt ls demo
      stackwise ckpt ls demo --json
    """
    from stackwise.checkpoint.retention import kept
    from stackwise.tracking import units

    folder, store = open_store(run)
    commits, scores, verified = store.commits(), scores_of(store), store.verified()
    for path, what in store.damaged().items():
        note(f"{path}: {what}; {store.repair_command}")
    pins, _ = store.refs.pins()
    reasons = kept(commits, retention_of(folder), pins=pins, scores=scores, verified=verified)
    best = min((c.id for c in commits if c.id in scores), key=lambda c: scores[c], default=None)
    rows: list[dict[str, Any]] = []
    for commit in commits:
        progress, stage = _position(store, commit)
        rows.append(
            {
                "commit": commit.id,
                "step": commit.step,
                "number": commit.number,
                "stage": progress.get("stage"),
                "stage_name": stage,
                "loss": progress.get("loss_last"),
                "validation": scores.get(commit.id),
                "best": commit.id == best,
                "bytes_new": commit.bytes_written,
                "bytes_shared": commit.bytes_total - commit.bytes_written,
                "pins": [p for p in (commit.pin, *sorted(n for n in pins if pins[n] == commit.id)) if p],
                "kept": list(reasons.get(commit.id, ())),
                "verified": verified.get(commit.id),
                "time": commit.time,
            }
        )
    if as_json:
        print_json(rows)
        return
    if not rows:
        print(f"No commits in {store.root}.")
        return
    heads = ["commit", "step", "text:stage", "loss", "validation", "new", "shared", "text:kept"]
    print_table(
        "",
        [*heads, "text:verified"],
        [
            [
                row["commit"],
                units.steps(row["step"]),
                row["stage_name"] or "-",
                units.loss(row["loss"]),
                units.loss(row["validation"]) + ("*" if row["best"] else ""),
                units.size(row["bytes_new"]),
                units.size(row["bytes_shared"]),
                ", ".join(row["kept"]) or "-",
                date(row["verified"]),
            ]
            for row in rows
        ],
    )


def _position(store: Store, commit: Commit) -> tuple[dict[str, Any], str | None]:
    """Counters of a commit, and the name of its stage."""
    meta = store.meta(commit)
    progress, stages = meta.get("progress", {}), meta.get("stages", [])
    index = progress.get("stage", 0)
    return progress, stages[index]["name"] if index < len(stages) else None


def show(
    run: Run,
    commit: CommitName = "latest",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show one commit: where the run stood, its stages, its stacks, and its parts with sizes and hashes.

    The hash of a part is the SHA-256 of its file: `sha256sum RUN/store/objects/ab/abcd...` checks it without StackWise.

    \b
    Examples:
      stackwise ckpt show demo
      stackwise ckpt show demo stage-02 --tensors
      stackwise ckpt show demo best --json
    """
    from stackwise.tracking import units

    _, store = open_store(run)
    chosen = store.find(commit)
    meta = store.meta(chosen)
    if as_json:
        print_json(_facts(store, chosen, meta))
        return
    progress, stage = _position(store, chosen)
    print(
        f"{chosen.id}: step {units.steps(chosen.step)}, stage {stage or '-'}, commit number {chosen.number}"
    )
    known = {"parent": chosen.parent and chosen.parent[:16], "pin": chosen.pin, "sha256": chosen.sha256}
    for name, value in known.items():
        print(f"  {name:<7} {value or '-'}")
    print(
        f"  {'written':<7} {date(chosen.time)}, {units.size(chosen.bytes_written)} new of "
        f"{units.size(chosen.bytes_total)}"
    )
    print(
        f"  {'stood':<7} {units.count(progress.get('tokens'))} tokens, loss {units.loss(progress.get('loss_last'))}"
    )
    for change in progress.get("changes", []):
        print(
            f"  {'changed':<7} {change['key']} at step {change['step']}: {change['old']} -> {change['new']}"
        )
    if "forked" in meta:
        print(f"  {'fork of':<7} {meta['forked']['run']}, commit {meta['forked']['commit']}")
    _print_rack(meta)
    _print_stages(meta)
    rows = [
        [part.name, str(len(part.tensors)), units.size(part.bytes), part.sha256[:16]]
        for _, part in sorted(chosen.parts.items())
    ]
    print_table("Parts", ["part", "tensors", "size", "text:sha256"], rows)
    if tensors:
        listed = [
            [part.name, t.name, t.dtype, str(list(t.shape))]
            for _, part in sorted(chosen.parts.items())
            for t in part.tensors
        ]
        print_table("Tensors", ["part", "text:tensor", "text:dtype", "text:shape"], listed)


def _print_rack(meta: dict[str, Any]) -> None:
    if "rack" not in meta:
        return
    from stackwise.model.spec import RackSpec

    spec = RackSpec.from_dict(meta["rack"])
    rows = [
        [
            stack.uid,
            str(len(stack.blocks)),
            stack.weight_format,
            ", ".join(f"{s.name} (rank {s.rank})" for s in stack.adapters) or "-",
            "yes" if stack.trained else "no",
        ]
        for stack in spec.stacks
    ]
    print_table(
        f"Rack: width {spec.d_model}, vocabulary {spec.vocab_size:,}",
        ["stack", "blocks", "text:format", "text:adapters", "text:trained"],
        rows,
    )


def _print_stages(meta: dict[str, Any]) -> None:
    stages, at = meta.get("stages", []), meta.get("progress", {})
    rows = []
    for index, stage in enumerate(stages):
        here = index == at.get("stage")
        state = "done" if index < at.get("stage", 0) else f"step {at['stage_step']}" if here else "to come"
        rows.append(
            [stage["name"], str(stage["n_stacks"]), str(stage["steps"]), ", ".join(stage["trains"]), state]
        )
    if rows:
        print_table("Stages", ["stage", "stacks", "steps", "text:trains", "text:state"], rows)


def _facts(store: Store, commit: Commit, meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "commit": commit.id,
        "step": commit.step,
        "number": commit.number,
        "sha256": commit.sha256,
        "parent": commit.parent,
        "pin": commit.pin,
        "time": commit.time,
        "path": str(commit.path),
        "validation": scores_of(store).get(commit.id),
        "bytes_new": commit.bytes_written,
        "bytes_total": commit.bytes_total,
        "parts": [
            {
                "part": part.name,
                "sha256": part.sha256,
                "bytes": part.bytes,
                "path": str(store.objects.path(part.sha256)),
                "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in part.tensors],
            }
            for _, part in sorted(commit.parts.items())
        ],
        "meta": meta,
    }
