"""What can go wrong with a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

SHOWN = 12
"""Lines of a long list that a message shows."""


class InterchangeError(ValueError):
    """A model folder that cannot be read, or a model that cannot be written as asked. The message has the way out."""

    exit_code: ClassVar[int] = 2


def listed(title: str, lines: Iterable[str]) -> str:
    """`title`, then one line per entry; of a long list the beginning and how many more there are."""
    rows = list(lines)
    more = [f"and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return "\n  ".join([title, *rows[:SHOWN], *more])


def shape_text(shape: Sequence[int]) -> str:
    """[768, 50257], also for tensors and sizes."""
    return str([int(n) for n in shape])
