"""Printing: results on standard output, remarks on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

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
        table.add_row(*(Text(cell) for cell in row))
    out = console()
    out.print(table)
    if caption:
        out.print(Text(caption, style="dim"))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def documents(count: int) -> str:
    """`1 document`, `2 documents`."""
    return f"{count:,} document" + ("" if count == 1 else "s")


def note(text: str) -> None:
    """A remark that is not part of the result."""
    print(f"note: {text}", file=sys.stderr)


def next_steps(**commands: str) -> None:
    """Commands to type next, each under what it does (`_` stands for a blank)."""
    width = max(map(len, commands))
    print("\nNext")
    for effect, command in commands.items():
        print(f"  {effect.replace('_', ' '):<{width}}   {command}")
