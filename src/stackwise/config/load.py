"""From files, parents and overrides to one nested map, with the place where each key was written."""

import copy
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stackwise.config import presets
from stackwise.config.document import MAX_BYTES, Document, parse, parse_value
from stackwise.config.errors import NO_VALUE, ConfigError, Problem
from stackwise.config.shape import (
    Path,
    Source,
    accepts,
    dotted,
    field_at,
    nearest_key,
    source_of,
    value_at,
)

COMMAND_LINE = "command line"


def load_file(path: FilePath, chain: tuple[FilePath, ...] = ()) -> Document:
    """Read a YAML file laid over its `base` parents. Raises OSError, or ConfigError if it is no YAML map."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(
            Problem("", f"larger than {MAX_BYTES} bytes, too large for a configuration", file=str(path))
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(Problem("", f"not UTF-8 text at byte {error.start}", file=str(path))) from None
    return with_bases(parse(text, str(path)), path.parent, (*chain, path.resolve()))


def with_bases(document: Document, folder: FilePath, chain: tuple[FilePath, ...] = ()) -> Document:
    """The document laid over the parents its key `base` names, in their order. `chain`: files on the way here."""
    base = document.data.pop("base", None)
    file, line = source_of(("base",), document.sources)
    merged = Document()
    for name in base if isinstance(base, list) else [] if base is None else [base]:

        def problem(message: str, value: Any = NO_VALUE) -> Problem:
            return Problem("base", message, value, file=file, line=line)

        if not isinstance(name, str):
            merged.problems.append(problem("must name presets or YAML files", name))
            continue
        try:
            path = presets.locate(name, folder)
            if path.resolve() in chain:
                names = " -> ".join(link.name for link in (*chain[chain.index(path.resolve()) :], path))
                merged.problems.append(problem(f"the parents form a cycle: {names}"))
                continue
            merged.merge(load_file(path, chain))
        except OSError as error:
            merged.problems.append(problem(str(error)))
        except ConfigError as error:
            merged.problems += error.problems
    merged.merge(document)
    return merged


def apply_overrides(document: Document, overrides: Iterable[str], cls: type[BaseModel]) -> None:
    """Set `section.key=value` pairs, the value read as YAML; a number in the key is a position in a list."""
    for text in [overrides] if isinstance(overrides, str) else overrides:
        try:
            _override(document, text, cls)
        except ConfigError as error:
            document.problems += error.problems


def _override(document: Document, text: str, cls: type[BaseModel]) -> None:
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(Problem(text, "not an override", allowed="section.key=value", file=COMMAND_LINE))
    path: Path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    found, field = field_at(cls, path)
    if field is None or (found != path and not accepts(field) & {"list", "map"}):
        raise ConfigError(Problem(key, "unknown key", hint=nearest_key(cls, path), file=COMMAND_LINE))
    if "list" not in accepts(field):  # inside a map a number is a key like any other
        path = (*found, *(str(part) for part in path[len(found) :]))
    value = _override_value(key, value_text, accepts(field) if found == path else set())
    position = next((i for i, part in enumerate(path) if isinstance(part, int)), None)
    if position is not None:
        # Lists merge as a whole: the list with the item changed is what overrides.
        value = _list_with(document, path, position, value, field)
        path = path[:position]
    change = value
    for part in reversed(path):
        change = {part: change}
    document.merge(Document(change, {path: Source(COMMAND_LINE)}))


def _override_value(key: str, text: str, accepted: set[str]) -> Any:
    """Read the value as YAML, but take it as it stands where only text will do: `run_id=42`, `prompt=ROMEO:`."""
    wants_text = "str" in accepted and accepted <= {"str", "list", "null"}
    try:
        value = parse_value(text)
    except ConfigError as error:
        if wants_text:
            return text
        reason = error.problems[0].message
        raise ConfigError(
            Problem(key, reason if reason.startswith("some readers") else "not YAML", text, file=COMMAND_LINE)
        ) from None
    if not wants_text or (isinstance(value, list) and "list" in accepted):
        return value
    quoted = isinstance(value, str) and text.lstrip().startswith(("'", '"'))
    null = value is None and text != "" and "null" in accepted
    return value if quoted or null else text


def _list_with(document: Document, path: Path, position: int, value: Any, field: FieldInfo) -> Any:
    """A copy of the list at path[:position] in which what the rest of the path names has the value."""
    items = value_at(document.data, path[:position])
    if items is NO_VALUE:
        items = field.get_default(call_default_factory=True)
    items = copy.deepcopy(items)
    try:
        value_at(items, path[position:-1])[path[-1]] = value
    except (IndexError, TypeError):
        length = len(items) if isinstance(items, list) else 0
        message = f"no such item, the list has {length}"
        raise ConfigError(Problem(dotted(path), message, file=COMMAND_LINE)) from None
    return items
