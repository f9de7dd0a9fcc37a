"""`stackwise eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Run, Threads, find_run


def evaluate(
    run: Run,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Another text than the held-out one: a text, JSONL or Parquet file, a glob, or a prepared corpus.",
        ),
    ] = None,
    text_key: Annotated[
        str | None,
        typer.Option("--text-key", metavar="KEY", help="The field of JSONL and Parquet that holds the text."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="N",
            min=1,
            help="Causal: windows begin every N tokens and overlap, so that every token has more before it.",
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", metavar="N", min=2, help="Tokens per window; `training.seq_len` by default."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Rows per batch: speed and memory, not the result."
        ),
    ] = None,
    by_time: Annotated[
        bool,
        typer.Option("--by-time", help="Diffusion: also estimate the bound over random times, as a check."),
    ] = False,
    pseudo_windows: Annotated[
        int | None,
        typer.Option(
            "--pseudo-windows",
            metavar="N",
            min=1,
            help="mlm: windows for pseudo-perplexity, each as many forward passes as it has tokens.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="FILE,...",
            help="Score the run on tasks instead: local files, or names of lm-eval's tasks.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Tasks: only the first N rows of each.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", metavar="K", min=0, help="Tasks: K solved examples before every prompt."),
    ] = None,
    mc_samples: Annotated[
        int | None,
        typer.Option(
            "--mc-samples",
            metavar="N",
            min=1,
            help="Tasks, diffusion: draws of masks per text; 16 by default.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Keep the figures in a JSON file in this folder."),
    ] = None,
    depth: Annotated[
        bool,
        typer.Option("--depth", help="Measure what each stack is good for instead; kept in depth.json."),
    ] = False,
    batches: Annotated[
        int | None,
        typer.Option(
            "--batches",
            metavar="N",
            min=1,
            help="Depth: as many held-out batches of `training.batch_size` rows; 16 by default.",
        ),
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Measure a run: loss, perplexity and bits per byte on its held-out text, or scores on tasks.

    A causal model has an exact likelihood, a diffusion model an upper bound of it, in parts by the share of masked
    tokens. An mlm model has masked loss and accuracy, and pseudo-perplexity, which is no likelihood. All but the causal
    ones are held against guesses without context.

    --tasks takes files of minimal pairs, multiple choice or generation, one JSON object per line, and with
    `pip install 'stackwise[eval]'` names of lm-eval's tasks. docs/evaluation.md shows the files.

    --depth takes every stack out in turn, reads the loss after each, and compares their outputs, norms and gradients;
    `stackwise report` draws the figures. docs/depth-diagnostics.md says what each of them is.

    Computed in float32 over windows of `training.seq_len` that do not overlap, without --stride. Bits per byte does not
    depend on the tokenizer, so it compares runs with different ones.

    \b
    Examples:
      stackwise eval runs/demo
      stackwise eval demo --batch-size 64 --json
      stackwise eval demo --text book.txt --stride 16 --out results
      stackwise eval runs/diffusion --by-time
      stackwise eval demo --tasks pairs.jsonl,quiz.jsonl --limit 200 --out results
      stackwise eval demo --depth --batches 4
    """
    path = find_run(run)
    of_text: dict[str, object] = {
        "--text": text,
        "--text-key": text_key,
        "--seq-len": seq_len,
        "--stride": stride,
    }
    of_text |= {"--by-time": by_time or None, "--pseudo-windows": pseudo_windows}
    if tasks is not None:
        _refuse("is not for --tasks", {**of_text, "--depth": depth or None, "--batches": batches})
        from stackwise.cli.evaluate_tasks import evaluate_tasks
        from stackwise.training.stored import open_run

        evaluate_tasks(
            path,
            open_run(path),
            tasks,
            limit=limit,
            shots=shots,
            mc_samples=mc_samples,
            batch_size=batch_size,
            out=out,
            as_json=as_json,
        )
        return
    _refuse("goes with --tasks", {"--limit": limit, "--shots": shots, "--mc-samples": mc_samples})
    if depth:
        _refuse("is not for --depth", {**of_text, "--out": out})
        from stackwise.cli.evaluate_depth import evaluate_depth
        from stackwise.training.stored import open_run

        evaluate_depth(path, open_run(path), batches=batches, batch_size=batch_size, as_json=as_json)
        return
    _refuse("goes with --depth", {"--batches": batches})
    from stackwise.cli.evaluate_text import evaluate_text
    from stackwise.training.stored import open_run

    evaluate_text(
        path,
        open_run(path),
        text=text,
        text_key=text_key,
        seq_len=seq_len,
        stride=stride,
        batch_size=batch_size,
        by_time=by_time,
        pseudo_windows=pseudo_windows,
        out=out,
        as_json=as_json,
    )


def _refuse(reason: str, options: dict[str, object]) -> None:
    """UsageError for options that were given and mean nothing here."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} {reason}; leave it out")
