"""Writes the parts of docs/ that follow from the code: the table of keys, the public names, the commands.

    python docs/generate.py            write them again (`make docs`)
    python docs/generate.py --check    exit code 1 if one of them is out of date

A generated part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; the rest of a page is written by
hand and stays as it is.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stackwise
from stackwise.config.schema import SchemaRow, schema_rows

DOCS = Path(__file__).parent

# Sections of the configuration, in the order of the page, under the headings that they get.
HEADINGS = {
    "base": "Parents",
    "model": "Model",
    "objective": "Objective",
    "training": "Training",
    "training.optimizer": "Optimizer",
    "training.progressive": "Growth",
    "data": "Data",
    "checkpoint": "Checkpoints",
    "evaluation": "Evaluation",
    "generation": "Generation",
    "tracking": "Tracking",
}


def keys() -> str:
    """One table per section: key, type and default, allowed values, meaning."""
    tables: dict[str, list[SchemaRow]] = {name: [] for name in HEADINGS}
    for row in schema_rows():
        name = max((n for n in HEADINGS if f"{row.key}.".startswith(f"{n}.")), key=len)
        tables[name].append(row)
    parts = []
    for name, rows in tables.items():
        lines = [
            f"### {HEADINGS[name]}",
            "",
            "| key | type = default | allowed | meaning |",
            "|---|---|---|---|",
        ]
        for row in rows:
            cells = (f"`{row.key}`", f"`{row.type} = {row.default}`", row.allowed, row.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def names() -> str:
    """Every public name with its signature and docstring; of a class also the public methods and properties."""
    parts = []
    for name in stackwise.__all__:
        if not name.startswith("_"):
            parts.append(_entry(name, getattr(stackwise, name)))
    return "\n\n".join(parts)


def _entry(name: str, thing: Any) -> str:
    lines = [f"### {name}", ""]
    if not hasattr(thing, "model_fields"):  # settings are described by their keys
        lines += [f"`{name}{_signature(thing)}`", ""]
    lines.append(_text(thing.__doc__))
    if inspect.isclass(thing):
        members = [_member(key, thing.__dict__[key]) for key in thing.__dict__ if not key.startswith("_")]
        lines += ["", *filter(None, members)] if any(members) else []
    return "\n".join(lines)


def _member(name: str, member: Any) -> str:
    """A list item for a method or property; nothing for data and for what only overrides."""
    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    if isinstance(member, property):
        head = name
    elif inspect.isfunction(function):
        head = name + _signature(function, drop_first=not isinstance(member, staticmethod))
    else:
        return ""
    text = " ".join(_escape(inspect.cleandoc(function.__doc__ or "")).split())
    if not text and name == "forward":
        return ""
    return f"- `{head}`" + (f": {text}" if text else "")


def _signature(thing: Any, drop_first: bool = False) -> str:
    signature = inspect.signature(thing)
    if drop_first:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    if inspect.isclass(thing):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    text = re.sub(r"(?<=[:>] )'([^']*)'", r"\1", str(signature))  # annotations that are kept as text
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)


def _text(docstring: str | None) -> str:
    """A docstring with each paragraph and each item of a list on one line; indented lines stay as they are."""
    paragraphs = _escape(inspect.cleandoc(docstring or "")).split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else re.sub(r"\n(?!- )\s*", " ", p) for p in paragraphs)


def _escape(text: str) -> str:
    """Angle brackets outside of code would be taken for HTML."""
    parts = text.split("`")
    return "`".join(p if i % 2 else p.replace("<", "&lt;") for i, p in enumerate(parts))


def commands() -> str:
    """Every verb and sub-verb as its `--help` has it: usage, text, examples, arguments and options."""
    import typer

    from stackwise.cli.main import HELP_NAMES, app

    found: list[tuple[str, Any]] = []

    def walk(name: str, command: Any) -> None:
        found.append((name, command))
        for child, below in getattr(command, "commands", {}).items():
            walk(f"{name} {child}", below)

    walk("stackwise", typer.main.get_command(app))
    verbs = found[1:]
    listed = ["| command | does |", "|---|---|"]
    for name, command in verbs:
        text = _first_sentence(command.short_help or command.help)
        listed.append(f"| [`{name}`](#{name.replace(' ', '-')}) | {text} |")
    return "\n\n".join(["\n".join(listed), *(_command(name, command, HELP_NAMES) for name, command in found)])


def _command(name: str, command: Any, settings: dict[str, Any]) -> str:
    context = command.context_class(command, info_name=name, **settings)
    pieces = " ".join([name, *command.collect_usage_pieces(context)])
    usage = re.sub(r"\{(.+?)(?:\.\.\.)?\}|\[(\[\w+\])\]", r"\1\2", pieces)
    parts = [f"{'###' if name.count(' ') > 1 else '##'} {name}", f"`{usage}`"]
    for paragraph in (command.help or "").split("\n\n"):
        parts += _as_typed(paragraph[2:]) if paragraph.startswith("\b\n") else [_text(paragraph).strip()]
    rows = [record for param in command.params if (record := param.get_help_record(context))]
    if rows:
        cells = [
            f"| `{_cell(_bare(head))}` | {_cell(_escape(' '.join(text.split())))} |" for head, text in rows
        ]
        parts.append("\n".join(["| argument or option | meaning |", "|---|---|", *cells]))
    return "\n\n".join(parts)


def _as_typed(paragraph: str) -> list[str]:
    """A paragraph whose lines stay as they are, below its first line where that is a title."""
    title, _, body = (
        paragraph.partition("\n") if paragraph.partition("\n")[0].endswith(":") else ("", "", paragraph)
    )
    return [*filter(None, [title]), f"```text\n{inspect.cleandoc(body)}\n```"]


def _bare(head: str) -> str:
    """Without the Python type that typer puts behind the name of an argument."""
    return re.sub(r" <(?:list\[)?\w+\]?>$", "", head)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


def faults() -> str:
    """What the long run of benchmarks/faults.py came to, from its records."""
    sys.path.insert(0, str(DOCS.parent / "benchmarks"))
    try:
        from reliability.page import tables
    finally:
        sys.path.pop(0)
    return tables()


PARTS: list[tuple[str, str, Callable[[], str]]] = [
    ("configuration.md", "keys", keys),
    ("api.md", "names", names),
    ("commands.md", "commands", commands),
    ("reliability.md", "faults", faults),
]
"""Page, name of the generated part, and what writes it."""


def pages() -> dict[Path, str]:
    """Page -> its text with the generated parts as they should be."""
    texts: dict[Path, str] = {}
    for file, name, write in PARTS:
        path = DOCS / file
        text = texts.get(path) or path.read_text(encoding="utf-8")
        begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{path} must hold the lines {begin!r} and {end!r} once each")
        head, tail = text.partition(begin)[0], text.partition(end)[2]
        texts[path] = f"{head}{begin}\n\n{write()}\n\n{end}{tail}"
    return texts


def main(arguments: list[str]) -> int:
    """Write what has changed, or with --check only tell."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    stale = {p: text for p, text in pages().items() if text != p.read_text(encoding="utf-8")}
    for path, text in stale.items():
        if arguments:
            print(f"{path} is out of date; run `make docs`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
