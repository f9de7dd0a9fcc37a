"""Configuration errors: every problem at once, each with its key, place and way out."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final


class NoValue(Enum):
    """The type of NO_VALUE."""

    NO_VALUE = "no value"


NO_VALUE: Final = NoValue.NO_VALUE
"""Stands for "no value was given", where None would mean an explicit null."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str
    """Dotted key, such as `training.optimizer.lr`; empty when the problem is the file as a whole."""
    message: str
    """What is wrong, in a few words."""
    value: Any = NO_VALUE
    """The value that was given."""
    allowed: str = ""
    """What would be accepted."""
    hint: str = ""
    """The nearest spelling or the way out, a short sentence."""
    file: str = ""
    """Where the key was written: a path, or "command line"."""
    line: int | None = None
    """Line in that file, from 1."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else self.file
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        if self.value is not NO_VALUE:
            text += f", got {HIDDEN if is_secret(self.key) else show(masked(self.value))}"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.hint:
            text += f"; {self.hint}"
        return text


class ConfigError(ValueError):
    """A configuration that cannot be used. `problems` holds everything found, and `str()` lists it."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [f"{len(self.problems)} problems in the configuration:"]
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


_SECRET = re.compile(
    r"(.*[._-])?((?<!mask_)token|secret|password|passwd|api_?key|access_?key|credentials?)", re.IGNORECASE
)
HIDDEN = "(hidden)"
"""What is shown in place of a secret."""


def is_secret(key: str) -> bool:
    """Whether the last word of a key says that its value is nobody's business: `hub.token`, `api_key`."""
    return _SECRET.fullmatch(key) is not None


def masked(data: Any) -> Any:
    """A copy of nested data in which the values of secret keys are hidden; null stays, as it tells nothing."""
    if isinstance(data, dict):
        return {
            key: HIDDEN if is_secret(str(key)) and value is not None else masked(value)
            for key, value in data.items()
        }
    return [masked(item) for item in data] if isinstance(data, list | tuple) else data


def show(value: Any) -> str:
    """The value as a user would write it in YAML, cut to one short line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option spelt most like `word`, or None when nothing is close. Case, `-` and `_` do not count."""
    plain = {_plain(option): option for option in options}
    close = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.6)
    return plain[close[0]] if close else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest option, or an empty string."""
    close = nearest(word, options)
    return f"did you mean {close!r}?" if close is not None else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
