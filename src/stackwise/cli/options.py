"""Arguments that several verbs take, how they are completed in the shell, and what they stand for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.errors import UsageError

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

RUNS = Path("runs")
"""Where a RUN is looked for when only its name is given: the default of `checkpoint.dir`."""


def load_config(config: str, overrides: Sequence[str] | None) -> StackWiseConfig:
    """The configuration behind CONFIG [KEY=VALUE]..., checked, with its notes left to the caller.

    Raises ConfigError, FileNotFoundError, UsageError.
    """
    from stackwise.config.presets import preset_names
    from stackwise.config.root import StackWiseConfig

    if "=" in config and not Path(config).exists():
        names = ", ".join(preset_names())
        raise UsageError(
            f"CONFIG is missing: {config!r} is an override; put a YAML file or a preset ({names}) before it"
        )
    if Path(config).is_dir():
        inside = Path(config) / "config.yaml"
        hint = f"; its configuration is {inside}" if inside.is_file() else ""
        raise UsageError(f"CONFIG must be a YAML file or a preset, {config!r} is a folder{hint}")
    return StackWiseConfig.from_yaml(config, overrides or ())


def find_run(run: str) -> Path:
    """The folder that RUN stands for: a path, or the name of a run in ./runs. A wrong name is a UsageError."""
    path = Path(os.path.expanduser(run))
    if path.exists() or path.name != run:
        return path
    if (RUNS / run).is_dir():
        return RUNS / run
    from stackwise.config.errors import did_you_mean

    names = run_names()
    hint = did_you_mean(run, names) or (
        f"{RUNS} holds {', '.join(names)}"
        if names
        else f"there is no run in ./{RUNS} yet: `stackwise demo` makes one"
    )
    raise UsageError(f"there is no run {run!r} here or in ./{RUNS}; {hint}")


def find_runs(runs: Sequence[str]) -> list[Path]:
    """The folders of several runs; one that is named twice is a UsageError."""
    paths = [find_run(run) for run in runs]
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise UsageError(f"{path} is named twice")
    return paths


def _set_threads(count: int | None) -> int | None:
    """Before torch is imported, its thread pool is set by the environment; after that, by torch."""
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(count)
    return count


def run_names() -> list[str]:
    return sorted(p.name for p in RUNS.iterdir() if p.is_dir() and p.name[0] != ".") if RUNS.is_dir() else []


def _complete_path(incomplete: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Folders, and files with one of the suffixes, that the text could become."""
    folder, start = Path(incomplete).parent, incomplete.rpartition("/")[2]
    lead = incomplete[: len(incomplete) - len(start)]
    if not folder.is_dir():
        return []
    return [
        f"{lead}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in sorted(folder.iterdir())
        if entry.name.startswith(start) and (entry.is_dir() or entry.suffix in suffixes)
        if start or not entry.name.startswith(".")
    ]


def complete_config(incomplete: str) -> list[str]:
    from stackwise.config.presets import preset_names

    return [*preset_names(), *_complete_path(incomplete, (".yaml", ".yml"))]


def _complete_key(incomplete: str) -> list[tuple[str, str]]:
    """`training.opt` becomes the keys that begin so, each with its `=` and its help."""
    from stackwise.config.schema import schema_rows

    return [(f"{row.key}=", row.help) for row in schema_rows() if row.key.startswith(incomplete)]


def complete_section(incomplete: str) -> list[str]:
    """Sections and keys of the configuration that begin so."""
    from stackwise.config.schema import schema_rows

    keys = [row.key for row in schema_rows()]
    sections = {key[:end] for key in keys for end, char in enumerate(key) if char == "."}
    return [name for name in sorted({*keys, *sections}) if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    return [*run_names(), *_complete_path(incomplete)]


Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or the name of a preset.", autocompletion=complete_config
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of single keys, such as training.optimizer.lr=1e-3.",
        autocompletion=_complete_key,
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, or its name where it lies in ./runs.", autocompletion=complete_run
    ),
]
Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Run folders, or their names where they lie in ./runs.",
        autocompletion=complete_run,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        callback=_set_threads,
        help="Processor threads to compute with; by default as many as torch takes, one per core.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Refuse folders that others may write to, that belong to somebody else or are links (exit code 8).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
