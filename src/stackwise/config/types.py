"""The value types that settings are made of. They refuse what YAML makes easy to get wrong: `true` is no number."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator, GetCoreSchemaHandler, Strict
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


def _whole(value: Any) -> Any:
    """Accept 128 and 1e3, refuse true and "128"."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError("int_type", "not a whole number")
    return value


def _index(key: Any) -> Any:
    """YAML and JSON write keys as text: "2" is 2."""
    return int(key) if isinstance(key, str) and key.strip().isdecimal() else key


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Int = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Int, Ge(1)]
Depth = Annotated[Int, Ge(1), Le(10_000)]
"""A number of stacks or blocks, each of which is described before anything is built."""
NonNegativeInt = Annotated[Int, Ge(0)]
Index = Annotated[NonNegativeInt, BeforeValidator(_index)]
"""A key of a map that counts something from 0."""
Seed = Annotated[Int, Ge(0), Lt(2**63)]
Float = Annotated[float, Strict()]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
UnitFloat = Annotated[Float, Ge(0), Le(1)]
"""A number from 0 to 1, both included."""
Share = Annotated[Float, Gt(0), Lt(1)]
"""A number between 0 and 1, both excluded."""
UpToOne = Annotated[Float, Gt(0), Le(1)]
"""A number from 0, excluded, to 1, included."""
BelowOne = Annotated[Float, Ge(0), Lt(1)]
"""A number from 0, included, to 1, excluded."""
Flag = Annotated[bool, Strict()]
Text = Annotated[str, MinLen(1)]
PathText = Annotated[str, BeforeValidator(_path), MinLen(1)]
"""A path, given as text or as a path object, kept as text."""


@dataclass(frozen=True, eq=False)  # hashed by identity, for `names` may be a list
class OneOf:
    """A text that must be in `names`, an open set: it grows when a user registers a part."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def known(value: str) -> str:
            if value not in self.names:
                raise PydanticCustomError("unknown_name", "not a known name")
            return value

        return core_schema.no_info_after_validator_function(known, handler(source))


@dataclass(frozen=True)
class Allowed:
    """Words for what a key accepts, where its type and bounds do not say it."""

    text: str
