"""Every key of the configuration as a row of text, generated from the settings."""

from typing import NamedTuple

from stackwise.config.root import StackWiseConfig
from stackwise.config.shape import allowed_text, default_text, dotted, section_of, type_text, walk


class SchemaRow(NamedTuple):
    """One key. `N` in a key stands for a position in a list."""

    key: str
    type: str
    default: str
    allowed: str
    help: str


def schema_rows() -> list[SchemaRow]:
    """One row for every key that holds a value, in the order of the settings; sections have none."""
    base = SchemaRow(
        "base",
        "str | list?",
        "null",
        "preset name, path of a YAML file, list of them",
        "Parents of this file, merged in their order under it. Paths are relative to the file.",
    )
    rows = [
        SchemaRow(
            dotted(path), type_text(field), default_text(field), allowed_text(field), field.description or ""
        )
        for path, field in walk(StackWiseConfig)
        if section_of(field.annotation) is None
    ]
    return [base, *rows]
