"""`stackwise train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Config, Overrides, Strict, Threads, load_config
from stackwise.cli.output import next_steps, note, watch_folders

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.tracking.events import Sink


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the stored run; an error where there is none.")
    ] = False,
    allow_fallback: Annotated[
        bool,
        typer.Option(
            "--allow-fallback",
            help="Where the newest commit is damaged: set it aside and go on from the newest whole one.",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="KEY,...",
            help="Keys that the stored run may go on with other values of, such as training.optimizer.lr.",
        ),
    ] = None,
    require_exact: Annotated[
        bool,
        typer.Option(
            "--require-exact",
            help="Refuse to continue where versions, threads or flags are not those of the stored run.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the run folder.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="One line per event, as in a pipe; no live display.")
    ] = False,
    strict: Strict = False,
    threads: Threads = None,
) -> None:
    """Train as a configuration says.

    Everything is written to `checkpoint.dir`/`training.run_id`: resolved configuration, environment, metrics,
    tokenizer, checkpoints, plots, report and sample. Ctrl-C, SIGTERM and SIGHUP save first (a second one stops at
    once); the same command then continues exactly where it stopped.

    \b
    Examples:
      stackwise train demo
      stackwise train my.yaml training.optimizer.lr=1e-3 training.run_id=faster
      stackwise train my.yaml data.source=text data.path='books/*.txt'
      stackwise train my.yaml --resume
      stackwise train my.yaml training.optimizer.lr=3e-4 --resume --allow-change training.optimizer.lr
    """
    settings = load_config(config, overrides)
    watch_folders(_folders(settings), strict)
    if allow_fallback:
        _fall_back(settings)
    if resume:
        _demand_run(settings)
    again = ["stackwise", "train", config, *(overrides or ()), "--resume"]
    run_dir = train_run(
        settings,
        sinks=choose_sinks(quiet, plain),
        again=shlex.join(again),
        allow_change=",".join(allow_change or ()).split(","),
        require_exact=require_exact,
    )
    if quiet:
        print(run_dir)
    else:
        show_results(run_dir, settings)


def _folders(settings: StackWiseConfig) -> list[Path]:
    """Folders whose content decides what a run becomes."""
    from stackwise.config.resolve import resolve

    resolved, _ = resolve(settings)
    run = Path(settings.checkpoint.dir) / settings.training.run_id
    caches = (resolved.data.cache_dir, resolved.training.progressive.cache_dir)
    return [run, run / "store", *(Path(cache) for cache in caches if cache)]


def train_run(settings: StackWiseConfig, *, sinks: list[Sink] | None, again: str, **options: Any) -> Path:
    """Train and give back the run folder; a stop by signal is raised again with the command that continues.

    `options` are those of `stackwise.train`.
    """
    from stackwise.training.errors import Interrupted
    from stackwise.training.run import train as run_training

    try:
        return Path(run_training(settings, sinks=sinks, **options)["run_dir"])
    except Interrupted as error:
        raise Interrupted(error.signum, f"{error}. To continue:\n  {again}") from None


def choose_sinks(quiet: bool, plain: bool) -> list[Sink] | None:
    """Where the events go besides metrics.jsonl; null is the console as it suits the terminal."""
    if quiet:
        return []
    if plain:
        from stackwise.tracking.console import ConsoleProgress

        return [ConsoleProgress(live=False)]
    return None


def show_results(run_dir: Path, settings: StackWiseConfig) -> None:
    """Where things are, and what to type next."""
    from stackwise.config.objective_rules import writes_samples
    from stackwise.tracking.folder import RunFolder

    folder = RunFolder(run_dir)
    print(f"\nRun     {folder.path}")
    if folder.report.exists():
        print(f"Report  {folder.report}")
    run = shlex.quote(str(run_dir))
    uses = {}
    if writes_samples(settings):
        uses["text_from_it"] = f"stackwise generate {run}"
    elif settings.training.progressive.training_objective == "mlm":
        uses["gaps_filled"] = f"stackwise fill {run} 'a text with a gap: [MASK]'"
    next_steps(
        **uses,
        measure_it=f"stackwise eval {run}",
        its_stages=f"stackwise runs show {run}",
    )


def _fall_back(settings: StackWiseConfig) -> None:
    """`--allow-fallback`: set aside what is damaged in the run that would be continued."""
    from stackwise.tracking.folder import RunFolder
    from stackwise.training.repair import fall_back

    checkpoint = settings.checkpoint
    if checkpoint.resume == "never" or checkpoint.overwrite:
        raise UsageError(
            "--allow-fallback continues a stored run; leave it out, or set checkpoint.resume=auto and "
            "checkpoint.overwrite=false"
        )
    stored = Path(checkpoint.dir) / settings.training.run_id
    folder = RunFolder(stored if checkpoint.resume == "auto" else Path(checkpoint.resume))
    for sentence in fall_back(folder):
        note(sentence)


def _demand_run(settings: StackWiseConfig) -> None:
    """`--resume`: continue what is stored, never start over, never delete."""
    from stackwise.tracking.folder import RunFolder

    checkpoint = settings.checkpoint
    checkpoint.overwrite = False
    if checkpoint.resume not in ("auto", "never"):
        return  # a path, which demands a run by itself
    checkpoint.resume = "auto"
    folder = RunFolder(Path(checkpoint.dir) / settings.training.run_id)
    if not folder.holds_a_run():
        raise UsageError(
            f"--resume: {folder.path} holds no run to continue; leave --resume out to start one, or set "
            "training.run_id and checkpoint.dir as they were (`stackwise runs` lists the runs there are)"
        )
    commits = folder.store / "commits"
    if not commits.is_dir() or not any(commits.iterdir()):
        raise UsageError(
            f"--resume: the run in {folder.path} ended before its first save, so there is nothing to continue; "
            "leave --resume out to start it over"
        )
