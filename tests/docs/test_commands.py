"""The reference of commands: every verb is there, and what its help shows as an example is a command line it takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from stackwise.cli.errors import exit_code
from stackwise.cli.main import app

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text("utf-8")


def commands(name: str = "stackwise", command: Any = None) -> Iterator[tuple[str, Any]]:
    command = command or typer.main.get_command(app)
    yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {child}", below)


ALL = dict(commands())


def parse(words: list[str]) -> None:
    """Raise what the command line would raise for wrong words; nothing runs."""
    name, words = words[0], words[1:]
    while hasattr(ALL[name], "commands") and words and not words[0].startswith("-"):
        name, words = f"{name} {words[0]}", words[1:]
        if name not in ALL:
            raise typer.BadParameter(f"no command {name!r}")
    ALL[name].make_context(name, list(words))


@pytest.mark.parametrize("name", ALL)
def test_a_command_has_its_entry_with_every_option(name: str) -> None:
    entry = re.search(rf"^###? {name}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert entry, "run `make docs`"
    for param in ALL[name].params:
        if not param.hidden and param.opts[0].startswith("--"):
            assert param.opts[0] in entry[1]
    assert len(entry[1].split()) > 5, "a command says what it does"
    assert "\\b" not in entry[1], "a raw docstring: its \\b is no mark for lines that stay as they are"


def test_every_verb_has_an_example() -> None:
    silent = [n for n, c in ALL.items() if n.count(" ") == 1 and "Examples:" not in (c.help or "")]
    below = [n for n in silent if not any(f"{n} " in m for m in ALL)]
    assert below == [], "its docstring lacks the paragraph `Examples:`"


@pytest.mark.parametrize("block", re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
def test_the_examples_of_the_help_are_lines_that_it_takes(
    block: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("stackwise ")]
    for line in lines:
        words = shlex.split(re.split(r"  +| > | \| ", line)[0])
        try:
            parse(words)
        except Exception as error:  # noqa: BLE001 - typer's own errors share no public base
            pytest.fail(f"{line}: {getattr(error, 'message', error)} (exit code {exit_code(error)})")


def test_a_wrong_example_would_be_found() -> None:
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        parse(["stackwise", "eval", "runs/demo", "--stirde", "3"])
    with pytest.raises(typer.BadParameter, match="no command"):
        parse(["stackwise", "ckpt", "list", "demo"])
