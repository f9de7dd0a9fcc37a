"""What `stackwise compare` is asked to compare: words of the command line to configs with labels."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stackwise.cli.errors import UsageError
from stackwise.cli.options import load_config

if TYPE_CHECKING:
    from stackwise.planning.contest import Entry

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_TAKEN = {
    "training.seed": "--seeds chooses the seeds, from that of the first config on",
    "checkpoint.dir": "--out DIR names the folder of the runs",
    "checkpoint.resume": "finished runs are kept and interrupted ones continued",
    "checkpoint.overwrite": "delete a run with `stackwise runs rm`, or name another --out",
}
"""Keys that the comparison sets itself, and what to do instead."""


class _Named(NamedTuple):
    """A CONFIG with overrides of its own; `label` where its training.run_id was given."""

    config: str
    own: list[str]
    label: str | None


def entries_of(words: Sequence[str], sweeps: Sequence[str], out: Path, budgets: int) -> list[Entry]:
    """The configs to compare, each with its label. Wrong words are a UsageError, wrong settings a ConfigError.

    `words`: CONFIG, 'CONFIG KEY=VALUE ...' and KEY=VALUE for all. `sweeps`: KEY=VALUE,VALUE,...; values at the same
    place of several of them belong together. `budgets`: how many each is trained with.
    """
    from stackwise.planning.contest import Entry

    named, shared = _sorted_out(words)
    sizes = _sizes(sweeps)
    if len(named) * len(sizes) * budgets < 2 or not named:
        raise UsageError(
            "there is nothing to compare: give two configs or more, such as demo 'demo "
            "training.progressive.enabled=false', sizes of one with --sweep, or several budgets"
        )
    entries = []
    for (family, one), size in product(zip(_labels(named), named, strict=True), sizes):
        label = "-".join([family, *(_in_label(word) for word in size)])
        overrides = [*shared, *one.own, *size, f"training.run_id={label}", f"checkpoint.dir={out}"]
        entries.append(Entry(label, load_config(one.config, overrides), family))
    return entries


def _sorted_out(words: Sequence[str]) -> tuple[list[_Named], list[str]]:
    """Configs with overrides of their own, and the overrides for all."""
    named, shared = [], []
    for word in words:
        if Path(word).exists():
            named.append(_Named(word, [], None))
        elif _OVERRIDE.match(word):
            shared.append(word)
        else:
            config, *own = _split(word)
            wrong = [part for part in own if not _OVERRIDE.match(part)]
            if wrong:
                raise UsageError(
                    f"{wrong[0]!r} in {word!r} is no override; write 'CONFIG KEY=VALUE KEY=VALUE'"
                )
            labels = [part.partition("=")[2] for part in own if part.startswith("training.run_id=")]
            own = [part for part in own if not part.startswith("training.run_id=")]
            named.append(_Named(config, own, labels[-1] if labels else None))
    if any(word.startswith("training.run_id=") for word in shared):
        raise UsageError(
            "training.run_id names one config: put it into the quotes of that one, 'CONFIG training.run_id=NAME'"
        )
    for word in (*shared, *(part for one in named for part in one.own)):
        key = word.partition("=")[0]
        if key in _TAKEN and not (key == "training.seed" and word in shared):
            raise UsageError(f"{key} cannot be set in a comparison: {_TAKEN[key]}")
    return named, shared


def _split(word: str) -> list[str]:
    try:
        parts = shlex.split(word)
    except ValueError as error:
        raise UsageError(f"{word!r} cannot be read: {error}") from None
    if not parts:
        raise UsageError("a CONFIG is empty")
    return parts


def _labels(named: Iterable[_Named]) -> list[str]:
    """A name for each: the given one, that of its file, or that with what tells it from the others."""
    listed = list(named)
    stems = [Path(one.config).stem for one in listed]
    labels = [
        one.label or ("-".join([stem, *map(_in_label, one.own)]) if stems.count(stem) > 1 else stem)
        for one, stem in zip(listed, stems, strict=True)
    ]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise UsageError(
                f"two configs are called {label!r}; give one a name of its own: 'CONFIG training.run_id=NAME'"
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]+", label):
            raise UsageError(
                f"{label!r} cannot name a run folder (letters, digits and . _ -); give another name: "
                "'CONFIG training.run_id=NAME'"
            )
    return labels


def _in_label(override: str) -> str:
    """`training.progressive.enabled=false` as a part of a name: `enabled-false`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.]+', '_', value).strip('_')}"


def _sizes(sweeps: Sequence[str]) -> list[list[str]]:
    """The overrides of each size; one without any where nothing is swept."""
    from stackwise.config.document import dump, parse_value
    from stackwise.config.errors import ConfigError

    columns: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        if not equals or not _OVERRIDE.match(sweep):
            raise UsageError(f"--sweep {sweep!r}: write KEY=VALUE,VALUE,...")
        try:
            values = parse_value(f"[{text}]")
        except ConfigError:
            raise UsageError(
                f"--sweep {sweep!r}: the values cannot be read; separate them by commas"
            ) from None
        if len(values) < 2:
            raise UsageError(f"--sweep {sweep!r} has one value; put it beside the configs as an override")
        if key in columns:
            raise UsageError(f"--sweep names {key} twice")
        if key in _TAKEN or key == "training.run_id":
            raise UsageError(
                f"{key} cannot be swept: {_TAKEN.get(key, 'the sizes are named by their values')}"
            )
        columns[key] = [f"{key}={dump([value]).removeprefix('- ').strip()}" for value in values]
    counts = {len(column) for column in columns.values()}
    if len(counts) > 1:
        told = ", ".join(f"{key} {len(column)}" for key, column in columns.items())
        raise UsageError(
            f"values of several --sweep at the same place belong together, but their counts differ: {told}"
        )
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return rows or [[]]
