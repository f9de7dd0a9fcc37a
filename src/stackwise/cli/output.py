"""Printing: results on standard output, remarks on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.storage.errors import UnsafeInputError
from stackwise.storage.regular import folder_risks
from stackwise.tracking.units import printable

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe, where nothing needs to be squeezed."""


def console() -> Console:
    """A rich console on standard output."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = ""
) -> None:
    """A table whose first column is text and whose other columns are figures, unless named `text:...`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(columns):
        text = index == 0 or name.startswith("text:")
        table.add_column(
            Text(name.removeprefix("text:")),
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=index == 0,
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    out = console()
    out.print(table)
    if caption:
        out.print(Text(printable(caption), style="dim"))


def print_json(value: Any) -> None:
    """JSON in which control characters are escapes of JSON, as they are not harmless on a terminal."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print("".join(c if printable(c) == c else f"\\u{ord(c):04x}" for c in text))


def documents(count: int) -> str:
    """`1 document`, `2 documents`."""
    return f"{count:,} document" + ("" if count == 1 else "s")


def note(text: str) -> None:
    """A remark that is not part of the result."""
    print(f"note: {printable(text)}", file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Callable[[str], Callable[[int, int], object]]]:
    """A bar on standard error, where that is a terminal. Call it with what is measured next; what it gives back takes how much
    of that is done, and how much there is.
    """
    from rich.console import Console
    from rich.progress import Progress

    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def begin(name: str) -> Callable[[int, int], object]:
            bar.reset(task, description=printable(name), total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield begin


def watch_folders(folders: Iterable[Path], strict: bool) -> None:
    """Say which of the folders somebody else could have changed; with `strict` that is an UnsafeInputError."""
    risks = [risk for folder in dict.fromkeys(folders) for risk in folder_risks(folder)]
    if risks and strict:
        raise UnsafeInputError("--strict: " + "; ".join(risks))
    for risk in risks:
        note(f"{risk}; what is read from there may not be what you wrote (--strict refuses it)")


def next_steps(**commands: str) -> None:
    """Commands to type next, each under what it does (`_` stands for a blank)."""
    width = max(map(len, commands))
    print("\nNext")
    for effect, command in commands.items():
        print(f"  {effect.replace('_', ' '):<{width}}   {command}")
