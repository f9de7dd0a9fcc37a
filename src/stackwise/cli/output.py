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
from stackwise.tracking.units import printable, spelled

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 160
"""Columns of a terminal for a table that goes into a file or a pipe, where nothing needs to be squeezed."""

_GAP = 2  # between two columns of a table


def console() -> Console:
    """A rich console on standard output."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = ""
) -> None:
    """A table whose first column is text and whose other columns are figures, unless named `text:...`.

    Words and figures are never torn apart: where they do not fit the terminal side by side, each row is a paragraph.
    """
    from rich.text import Text

    out = console()
    cells = [[spelled(printable(cell), out.encoding) for cell in row] for row in rows]
    is_text = [i == 0 or name.startswith("text:") for i, name in enumerate(columns)]
    heads = [name.removeprefix("text:") for name in columns]
    widths = _widths(heads, cells, is_text, out.width - _GAP * len(heads) - 1)
    if title:
        out.print(Text(title, style="bold"))
    if widths is None:
        _print_paragraphs(out, heads, cells)
    else:
        _print_columns(out, heads, cells, is_text, widths)
    if caption:
        out.print(Text(spelled(printable(caption), out.encoding), style="dim"))


def _widths(
    heads: Sequence[str], rows: Sequence[Sequence[str]], is_text: Sequence[bool], room: int
) -> list[int] | None:
    """Columns of the terminal for each column of a table; null where not even the longest words fit beside each other."""
    from rich.cells import cell_len

    wanted, least = [], []
    for i, head in enumerate(heads):
        cells = [row[i] for row in rows]
        words = [head, *cells] if is_text[i] and i else [head]  # these may be broken between words
        whole = [] if is_text[i] and i else cells
        wanted.append(max(map(cell_len, [head, *cells])))
        least.append(
            max(map(cell_len, [*whole, *(word for text in words for word in text.split())]), default=0)
        )
    spare = room - sum(least)
    if spare < 0:
        return None
    for i, width in enumerate(wanted):
        given = min(spare, width - least[i])
        least[i], spare = least[i] + given, spare - given
    return least


def _print_columns(
    out: Console,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    is_text: Sequence[bool],
    widths: Sequence[int],
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0))
    for head, text, width in zip(heads, is_text, widths, strict=True):
        table.add_column(Text(head), justify="left" if text else "right", width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


def _print_paragraphs(out: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    out.print()
    for row in rows:
        out.print(Text(row[0], style="bold"))
        facts = [f"{head} {cell}" for head, cell in zip(heads[1:], row[1:], strict=True)]
        out.print(Padding(Text("; ".join(facts)), (0, 0, 0, 2), expand=False))
    out.print()


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
