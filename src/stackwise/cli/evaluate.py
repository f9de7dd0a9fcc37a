"""`stackwise eval`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Run, Threads, find_run
from stackwise.cli.output import note, print_json
from stackwise.config.errors import ConfigError
from stackwise.config.objective_rules import corruption_of, label_of, masks

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.data.corpus import Corpus
    from stackwise.training.stored import OpenRun


def evaluate(
    run: Run,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Rows per batch: speed and memory, not the result."),
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
        typer.Option("--out", metavar="DIR", help="Tasks: keep the figures in a JSON file in this folder."),
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

    Computed in float32 over non-overlapping windows of `training.seq_len`. Bits per byte does not depend on the
    tokenizer, so it compares runs with different ones.

    \b
    Examples:
      stackwise eval runs/demo
      stackwise eval demo --batch-size 64 --json
      stackwise eval runs/diffusion --by-time
      stackwise eval demo --tasks pairs.jsonl,quiz.jsonl --limit 200 --out results
    """
    path = find_run(run)
    if tasks is not None:
        _refuse("is not for --tasks", {"--by-time": by_time or None, "--pseudo-windows": pseudo_windows})
        from stackwise.cli.evaluate_tasks import evaluate_tasks
        from stackwise.training.stored import open_run

        evaluate_tasks(
            path,
            open_run(path),
            tasks,
            limit=limit,
            shots=shots,
            mc_samples=mc_samples,
            batch_size=_checked_rows(batch_size),
            out=out,
            as_json=as_json,
        )
        return
    _refuse(
        "goes with --tasks",
        {"--limit": limit, "--shots": shots, "--mc-samples": mc_samples, "--out": out},
    )
    from stackwise.data.errors import DataError
    from stackwise.data.prepare import prepare
    from stackwise.training.stored import open_run

    opened = open_run(path)
    config = opened.config
    _check_options(config, by_time, pseudo_windows)
    if batch_size is not None:
        try:
            config.evaluation.batch_size = batch_size
        except ConfigError as error:
            raise ConfigError(replace(problem, key="--batch-size") for problem in error.problems) from None
    if config.data.tokenizer not in ("byte", "char"):
        config.data.tokenizer = str(opened.folder.tokenizer)  # the run's own copy, which is always there
    assert config.data.cache_dir is not None  # a stored configuration is resolved
    corpus = prepare(config.data, config.data.cache_dir)
    if corpus.tokenizer.hash != opened.tokenizer.hash:
        raise DataError(
            "the text holds other characters than when the run was trained, so its tokens mean something else",
            where=f"data.path {config.data.path}",
            hint="put the text back as it was",
        )
    if corpus.hash != opened.meta["corpus"]:
        note("the text has changed since the run was trained; what is held out now may have been trained on")
    if config.training.progressive.training_objective != "clm":
        from stackwise.cli.evaluate_masked import evaluate_masked

        evaluate_masked(path, opened, corpus, by_time=by_time, pseudo_windows=pseudo_windows, as_json=as_json)
        return
    _exact(path, opened, corpus, as_json)


def _refuse(reason: str, options: dict[str, object]) -> None:
    """UsageError for options that were given and mean nothing here."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} {reason}")


def _checked_rows(batch_size: int | None) -> int | None:
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}")
    return batch_size


def _check_options(config: StackWiseConfig, by_time: bool, pseudo_windows: int | None) -> None:
    """UsageError for an option that says nothing about this run."""
    label = label_of(config)
    if by_time and label != "bound":
        raise UsageError(f"--by-time is for runs whose loss is a bound, and that of this run is {label}")
    if pseudo_windows is not None and not (
        label == "pseudo" and masks(config) and corruption_of(config) != "gaussian"
    ):
        raise UsageError(
            "--pseudo-windows is for runs that have a pseudo-perplexity: mlm, or diffusion at point masks"
        )


def _exact(path: Path, opened: OpenRun, corpus: Corpus, as_json: bool) -> None:
    """The likelihood of a causal run."""
    from stackwise.evaluation.perplexity import perplexity
    from stackwise.training.device import pick_device

    config = opened.config
    result = perplexity(
        opened.rack.to(pick_device("auto")),
        corpus.validation,
        seq_len=config.training.seq_len,
        batch_size=config.evaluation.batch_size or config.training.batch_size,
        packing=config.data.packing,
        doc_mask=config.data.doc_mask,
        pad_id=corpus.tokenizer.pad_id,
    )
    if as_json:
        print_json(
            {"run": str(path), "commit": opened.commit.id, "step": opened.commit.step, **result.to_dict()}
        )
        return
    print(f"{path}, step {opened.commit.step:,}, on {corpus.validation.n_bytes:,} bytes of held-out text")
    print(f"  loss            {result.nats_per_token:.4f} nats per token ({result.label})")
    print(f"  perplexity      {result.perplexity:.3f}")
    if result.bits_per_byte is not None:
        print(f"  bits per byte   {result.bits_per_byte:.4f}")
    print(f"  tokens          {result.tokens:,} in {result.windows:,} windows of {result.seq_len:,}")
