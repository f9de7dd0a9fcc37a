"""Tables in any terminal: nothing is torn apart, nothing is lost, and no sign ends a command."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from stackwise.cli import output

HEADS = ["run", "text:status", "steps", "before growth", "validation"]


def printed(
    monkeypatch: pytest.MonkeyPatch, rows: list[list[str]], *, width: int, encoding: str = "utf-8"
) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(output, "console", lambda: Console(file=file, width=width, highlight=False))
    output.print_table("", HEADS, rows)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.fixture
def rows() -> list[list[str]]:
    return [
        [f"run-{i}", "not yet begun", f"{random.randint(1, 9999):,} k", f"{random.random():.4f}", "–"]
        for i in range(random.randint(1, 4))
    ]


def test_a_wide_terminal_has_a_line_for_each_row(monkeypatch, rows):
    lines = printed(monkeypatch, rows, width=100).strip().splitlines()
    assert len(lines) == len(rows) + 2
    assert "before growth" in lines[0]
    for line, row in zip(lines[2:], rows, strict=True):
        assert all(cell in line for cell in row)


@pytest.mark.parametrize("width", range(12, 80, 4))
def test_no_figure_is_torn_apart_in_a_narrow_one(monkeypatch, rows, width):
    text = printed(monkeypatch, rows, width=width)
    assert all(len(line) <= width for line in text.splitlines())
    words = text.replace(";", " ").split()
    for row in rows:
        for word in " ".join(row).split():
            assert word in words, (word, text)


def test_a_terminal_without_the_signs_gets_others(monkeypatch, rows):
    text = printed(monkeypatch, [[*rows[0][:4], "2 ± 1 → …"]], width=90, encoding="ascii")
    assert "2 +- 1 -> ..." in text
    assert "\\u" not in text
    assert "\\u65e5" in printed(monkeypatch, [["日", *rows[0][1:4], "–"]], width=90, encoding="ascii")
