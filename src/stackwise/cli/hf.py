"""`stackwise import` and `stackwise export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import RUNS, Run, Threads, find_run
from stackwise.cli.output import next_steps, note

if TYPE_CHECKING:
    from stackwise.interop.hf_export import Exported


def import_model(
    model: Annotated[
        str, typer.Argument(metavar="PATH_OR_ID", help="A model folder, or an id of the Hugging Face hub.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="RUN", help="Folder of the run to make; by default runs/NAME."),
    ] = None,
    stacks: Annotated[
        int | None,
        typer.Option("--stacks", metavar="N", help="Cut the layers into N stacks, as equal as can be."),
    ] = None,
    blocks_per_stack: Annotated[
        int | None, typer.Option("--blocks-per-stack", metavar="N", help="Cut them into stacks of N blocks.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="PATH_OR_ID", help="A tokenizer in place of the folder's own."),
    ] = None,
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Refuse weights that hold NaN or infinite values.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Take over a model of the Hugging Face format as a run.

    Reads config.json, safetensors files and tokenizer.json; tensor by tensor, so that it takes little more memory than
    the model. Nothing in the folder is run: pickled weights, keys that name code and files that lie elsewhere are
    refused (exit code 8). Keys of config.json that are not understood
    are refused by name, and so are tensors that are missing, unknown or of another shape.

    The run can be used like any other: for text, to plan, and to start another run from, with adapters, with more
    stacks, or for another objective.

    \b
    Examples:
      stackwise import openai-community/gpt2 --stacks 4
      stackwise import ./Llama-3.2-1B -o runs/llama --blocks-per-stack 4
      stackwise generate runs/llama --prompt 'Once upon a time'
      stackwise train runs/llama/config.yaml training.run_id=tuned data.source=text data.path=my.txt
    """
    from stackwise.interop.hf_import import read_model
    from stackwise.tracking.folder import RunFolder, RunFolderError
    from stackwise.training.adopt import adopt

    target = out or RUNS / Path(model.rstrip("/")).name
    if RunFolder(target).holds_a_run():
        raise RunFolderError(f"{target} already holds a run; choose another folder with --out")

    def watch(done: int, total: int) -> None:
        print(f"\rreading tensors {done:,} of {total:,}", end="", file=sys.stderr)
        if done == total:
            print(file=sys.stderr)

    imported = read_model(
        model,
        stacks=stacks,
        blocks_per_stack=blocks_per_stack,
        tokenizer=tokenizer,
        watch=watch if sys.stderr.isatty() else None,
        check_finite=check_finite,
    )
    folder = adopt(imported, target)
    for text in imported.notes:
        note(text)
    rack = imported.rack
    cuts = ", ".join(str(len(stack.blocks)) for stack in rack.spec.stacks)
    print(f"{imported.family.model_type}, {rack.get_parameter_count():,} parameters, blocks by stack: {cuts}")
    print(f"\nRun     {folder.path}")
    next_steps(
        text_from_it=f"stackwise generate {folder.path} --prompt 'Once upon'"
        if rack.is_causal
        else f"stackwise fill {folder.path}",
        train_it_on=f"stackwise train {folder.config} training.run_id=NAME data.source=text data.path=FILE",
    )


def export_model(
    run: Run,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The format; hf is the only one.")] = "hf",
    commit: Annotated[
        str | None,
        typer.Option(
            "--commit", metavar="COMMIT", help="latest, best, a pin, step:120, or the beginning of an id."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder to make; by default hf inside the run's."),
    ] = None,
    family: Annotated[
        str,
        typer.Option(
            "--family",
            metavar="NAME",
            help="auto: the family that the model equals, else stackwise. A name: that family, or an error with the reason.",
        ),
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="float32, bfloat16, float16 or float64; by default that of the file for an imported model, else float32.",
        ),
    ] = None,
    max_shard_size: Annotated[
        float, typer.Option("--max-shard-size", metavar="GB", min=1e-6, help="Size of a file at most, in GB.")
    ] = 5.0,
    separate: Annotated[
        bool,
        typer.Option(
            "--separate", help="Write adapter sets beside the model, in PEFT's format, not into it."
        ),
    ] = False,
    threads: Threads = None,
) -> None:
    """Write the model of a run in the Hugging Face format.

    A model that equals a family that `stackwise import` reads is written as one of that family: Transformers loads it
    with its own classes, other programs by their own loaders. Any other is written as a StackWise model, which
    Transformers loads after `import stackwise.interop.transformers`. Weights, tokenizer, generation settings and a model
    card with the facts of the run.

    \b
    Examples:
      stackwise export runs/demo
      stackwise export llama --out ./my-llama --dtype bfloat16
      stackwise export tuned --separate
      stackwise export demo --commit stage-02 --out ./two-stacks
    """
    if to != "hf":
        raise UsageError(f"--to {to!r} is no format that can be written; it is hf")
    exported = write_hf(
        find_run(run),
        out,
        commit=commit,
        family=family,
        dtype=dtype,
        shard_bytes=round(max_shard_size * 1e9),
        fold=not separate,
    )
    for text in exported.notes:
        note(text)
    print(f"{exported.family}, {', '.join(exported.files)}")
    print(f"\nFolder  {exported.path}")


def write_hf(
    path: Path, out: Path | None, *, commit: str | None = None, dtype: str | None = None, **options: Any
) -> Exported:
    """The model of a run in the Hugging Face format; `options` are those of `hf_export.write_model`."""
    from stackwise.interop.card import run_facts
    from stackwise.interop.hf_export import write_model
    from stackwise.training.stored import open_run

    opened = open_run(path, commit=commit)
    origin: dict[str, Any] = opened.meta.get("imported", {})
    return write_model(
        opened.rack,
        opened.tokenizer,
        out or path / "hf",
        dtype=dtype or _DTYPES.get(origin.get("dtype", ""), "float32"),
        config=opened.config,
        generation=origin.get("generation"),
        ids=origin.get("ids"),
        facts=run_facts(opened.config, opened.meta),
        **options,
    )


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F64": "float64"}
