"""The shape of the settings tree: its keys, what each accepts, and what a wrong value is reported as."""

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stackwise.config.errors import NO_VALUE, Problem, did_you_mean, show
from stackwise.config.types import Allowed, OneOf

Path = tuple[str | int, ...]
"""A key as its parts; list positions are numbers."""


class Source(NamedTuple):
    """Where a key was written."""

    file: str
    line: int | None = None


Sources = Mapping[Path, Source]


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def source_of(path: Path, sources: Sources) -> Source:
    """Where the key, or else the nearest section around it, was written."""
    for length in range(len(path), 0, -1):
        if path[:length] in sources:
            return sources[path[:length]]
    return Source("")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class that a field holds, or None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        sections = [section_of(option) for option in get_args(annotation)]
        return next((section for section in sections if section), None)
    return None


def item_section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class of the items of a list field, or None."""
    for option, _ in alternatives(annotation, []):
        if get_origin(option) is list and (section := section_of(get_args(option)[0])):
            return section
    return None


def walk(cls: type[BaseModel], prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Every key below a section, in order: sections, then their own keys; items of a list under `N`."""
    for name, field in cls.model_fields.items():
        path = (*prefix, name)
        yield path, field
        if section := section_of(field.annotation):
            yield from walk(section, path)
        elif item := item_section_of(field.annotation):
            yield from walk(item, (*path, "N"))


def field_at(cls: type[BaseModel], path: Path) -> tuple[Path, FieldInfo | None]:
    """The field that holds `path`, and the path of that field; None where a part of it is no key.

    What lies inside a field that is not a section (an entry of a list or of a free map) belongs to it.
    """
    section: type[BaseModel] | None = cls
    position = 0
    field = None
    while section is not None and position < len(path):
        name = path[position]
        field = section.model_fields.get(name) if isinstance(name, str) else None
        position += 1
        if field is None:
            return path[:position], None
        section = section_of(field.annotation)
        item = item_section_of(field.annotation)
        if item and position < len(path) and isinstance(path[position], int):
            section, position = item, position + 1
    return path[:position], field


def nearest_key(cls: type[BaseModel], path: Path) -> str:
    """`did you mean ...?` for an unknown key: the same name elsewhere, a sibling, or anything spelt alike."""
    keys = [key for key, _ in walk(cls)]
    if named := [key for key in keys if key[-1] == path[-1]]:
        plain = [key for key in named if "N" not in key] or named  # a section is meant sooner than a list
        alike = difflib.get_close_matches(dotted(path), [dotted(key) for key in plain], n=1, cutoff=0.0)
        return f"did you mean {alike[0]!r}?"
    siblings = [dotted(key) for key in keys if key[:-1] == path[:-1]]
    if hint := did_you_mean(dotted(path), siblings):
        return hint
    # An outer part may be missing or misspelt too: compare with the last parts of each key.
    tails = {dotted(key[-len(path) :]): dotted(key) for key in reversed(keys)}
    close = difflib.get_close_matches(dotted(path), tails, n=1, cutoff=0.7)
    return f"did you mean {tails[close[0]]!r}?" if close else ""


def value_at(data: Any, path: Path) -> Any:
    """The value at `path`, or NO_VALUE."""
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return NO_VALUE
    return data


def problems_of(
    error: ValidationError, cls: type[BaseModel], data: Any, sources: Sources | None = None
) -> dict[Path, Problem]:
    """One problem per wrong key, however many reasons pydantic gives for it."""
    found: dict[Path, Problem] = {}
    for detail in error.errors(include_url=False):
        path, field = field_at(cls, detail["loc"])
        if path in found:
            continue
        value = value_at(data, path)
        file, line = source_of(path, sources or {})
        if field is None:
            found[path] = Problem(
                dotted(path), "unknown key", hint=nearest_key(cls, path), file=file, line=line
            )
            continue
        if detail["type"] == "missing":
            message = "missing"
        elif detail["type"] in _OWN_MESSAGES:
            message = detail["msg"]
        else:
            message = "wrong value"
        hint = did_you_mean(value, names_of(field)) if isinstance(value, str) else ""
        if (
            not hint
            and isinstance(value, int | float)
            and accepts(field) <= {"str", "list", "null"}
            and "str" in accepts(field)
        ):
            hint = "put it in quotes to make it text"
        allowed = allowed_text(field)
        found[path] = Problem(dotted(path), message, value, allowed, hint, file, line)
    return found


_OWN_MESSAGES = {"regex", "folder_name", "device", "unknown_name"}


def names_of(field: FieldInfo) -> list[str]:
    """The names a field accepts, where it accepts names."""
    return [name for option, metadata in _options(field) for name in _names(option, metadata)]


def type_text(field: FieldInfo) -> str:
    """The type in short, such as `int?` or `str | list`; `?` allows null."""
    words = [_type_word(option) for option, _ in _options(field)]
    kinds = list(dict.fromkeys(word for word in words if word != "null"))
    return " | ".join(kinds) + ("?" if "null" in words else "")


def allowed_text(field: FieldInfo) -> str:
    """What the field accepts, in words."""
    texts = [_allowed_word(option, metadata) for option, metadata in _options(field)]
    return ", ".join(dict.fromkeys(texts))


def default_text(field: FieldInfo) -> str:
    """The default as a user would write it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else show(value)


def accepts(field: FieldInfo) -> set[str]:
    """The kinds of value a field accepts: str, int, float, bool, list, map, null."""
    return {_type_word(option) for option, _ in _options(field)}


def _options(field: FieldInfo) -> list[tuple[Any, list[Any]]]:
    return alternatives(field.annotation, list(field.metadata))


def alternatives(annotation: Any, metadata: list[Any]) -> list[tuple[Any, list[Any]]]:
    """A type as its alternatives, each with the constraints that hold for it."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return alternatives(inner, [*extra, *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for option in get_args(annotation) for part in alternatives(option, metadata)]
    return [(annotation, metadata)]


def _names(option: Any, metadata: list[Any]) -> list[str]:
    if get_origin(option) is Literal:
        return [str(name) for name in get_args(option)]
    return [name for constraint in metadata if isinstance(constraint, OneOf) for name in constraint.names]


def _type_word(option: Any) -> str:
    if option is None or option is type(None):
        return "null"
    if get_origin(option) is Literal:
        return "str"
    origin = get_origin(option) or option
    if origin is dict or section_of(option):
        return "map"
    return str(getattr(origin, "__name__", origin))


def _allowed_word(option: Any, metadata: list[Any]) -> str:
    for constraint in metadata:
        if isinstance(constraint, Allowed):
            return constraint.text
    if names := _names(option, metadata):
        return ", ".join(names)
    word = _type_word(option)
    if word == "list":
        (item,) = (_allowed_word(*part) for part in alternatives(get_args(option)[0], []))
        return f"list of {_length(metadata)}{item}"
    if word == "map" and (section := section_of(option)):
        return "map of " + ", ".join(section.model_fields)
    words = {"bool": "true, false", "str": "text", "int": "whole number", "float": "number", "map": "map"}
    return words.get(word, word) + _bounds(metadata)


def _length(metadata: list[Any]) -> str:
    shortest = next((c.min_length for c in metadata if isinstance(c, MinLen)), 0)
    longest = next((c.max_length for c in metadata if isinstance(c, MaxLen)), None)
    if shortest == longest:
        return f"{shortest} of: "
    return f"at least {shortest} of: " if shortest else ""


def _bounds(metadata: list[Any]) -> str:
    signs = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in metadata
        for kind, (name, sign) in signs.items()
        if isinstance(constraint, kind)
    ]
    return " " + " and ".join(bounds) if bounds else ""
