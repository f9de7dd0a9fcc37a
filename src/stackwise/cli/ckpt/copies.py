"""`stackwise ckpt fork`, `export` and `import`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.ckpt.common import CommitName, open_store
from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Overrides, Run
from stackwise.cli.output import next_steps, note, print_json


def fork(
    run: Run,
    commit: CommitName,
    new_run: Annotated[
        str, typer.Argument(metavar="NEW_RUN", help="Its name, for a folder beside RUN's; or a path.")
    ],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Make a run of its own that goes on from a commit: the same up to there, its own from there on.

    The new folder holds the commit, the log up to it, and the run's configuration with the given changes. Keys that say
    what is trained (the model, the text, the seed) cannot change; learning rates, lengths and batches can, and so can all
    that decides nothing. No weights are copied where the file system can give a file a second name.

    \b
    Examples:
      stackwise ckpt fork demo stage-02 longer training.max_steps=120
      stackwise train runs/longer/config.yaml
    """
    from stackwise.training import copies

    folder, store = open_store(run)
    chosen = store.find(commit)
    target = folder.path.parent / new_run if Path(new_run).name == new_run else Path(new_run).expanduser()
    made = copies.fork(folder, chosen, target, overrides or ())
    if as_json:
        print_json({"run": str(made.path), "from": chosen.id, "step": chosen.step})
        return
    print(f"{made.path} goes on from {chosen.id}, step {chosen.step}")
    next_steps(train_it=f"stackwise train {shlex.quote(str(made.config))}")


def export(
    run: Run,
    commit: CommitName,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="safetensors or hf (the Hugging Face format).")
    ] = "safetensors",
    as_json: Json = False,
) -> None:
    """Write a commit to a folder of plain files.

    safetensors: one file per part, the manifest, configuration, tokenizer and log. Any safetensors reader opens the
    files, `sha256sum -c SHA256SUMS` checks them, and `ckpt import` brings the commit back bit for bit, to train on.
    hf: the model alone, as `stackwise export --commit COMMIT` writes it.

    \b
    Examples:
      stackwise ckpt export demo best archive/demo-best
      stackwise ckpt export demo stage-02 archive/demo-hf --to hf
    """
    folder, store = open_store(run)
    chosen = store.find(commit)
    if to == "hf":
        from stackwise.cli.hf import write_hf

        exported = write_hf(folder.path, out, commit=chosen.id)
        for text in exported.notes:
            note(text)
    elif to == "safetensors":
        from stackwise.training import copies

        copies.export_commit(folder, chosen, out)
    else:
        raise UsageError(f"--to {to!r} is no format that can be written; known: safetensors, hf")
    listed = sorted(path.name for path in out.iterdir())
    if as_json:
        print_json({"folder": str(out), "commit": chosen.id, "format": to, "files": listed})
        return
    print(f"{chosen.id}: {len(listed)} files\n\nFolder  {out}")
    if to == "safetensors":
        next_steps(bring_it_back=f"stackwise ckpt import {shlex.quote(str(out))} NEW_RUN")


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `ckpt export` made, or the manifest in it.")
    ],
    new_run: Annotated[Path, typer.Argument(metavar="NEW_RUN", help="The run folder to make.")],
    as_json: Json = False,
) -> None:
    """Bring an exported commit back as a run, bit for bit.

    Every file is compared with its hash and every header checked before anything is used; nothing in the folder is
    run. The run can be used and trained on like any other.

    \b
    Examples:
      stackwise ckpt export demo latest archive/demo
      stackwise ckpt import archive/demo runs/again
      stackwise generate again --prompt 'Once upon'
    """
    from stackwise.training import copies

    if not source.exists():
        raise UsageError(
            f"{source} does not exist; `stackwise ckpt export RUN COMMIT FOLDER` makes such a folder"
        )
    made, commit = copies.import_commit(source, new_run)
    if as_json:
        print_json({"run": str(made.path), "commit": commit.id, "step": commit.step})
        return
    print(f"{made.path} holds {commit.id}, step {commit.step}")
    next_steps(
        what_it_is=f"stackwise ckpt show {shlex.quote(str(made.path))}",
        train_it_on=f"stackwise train {shlex.quote(str(made.config))}",
    )
