"""`Settings`, the base of every room's settings.

A room's `settings.py` imports nothing but this room, pydantic and the standard library, so that
reading a configuration never imports torch. The docstring under a field is its help text.
"""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stackwise.config.errors import ConfigError, did_you_mean
from stackwise.config.shape import problems_of


class Settings(BaseModel):
    """A section of the configuration: unknown keys are refused and every assignment is checked.

    A wrong value raises ConfigError, an unknown attribute AttributeError with the nearest name.
    Rules that join several keys are checked by `StackWiseConfig.validate`, not on assignment.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    if not TYPE_CHECKING:  # a type checker shall go by the declared fields

        def __init__(self, /, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise ConfigError(problems_of(error, type(self), data).values()) from None

        # pydantic would call an `__init__` of ours for nested sections too, and their errors would
        # lose their place; this mark, which its own `__init__` carries, keeps it from doing so.
        __init__.__pydantic_base_init__ = True

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                return super().__getattr__(name)
            raise self._unknown(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_") and name not in type(self).model_fields:
                raise self._unknown(name)
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise ConfigError(problems_of(error, type(self), {name: value}).values()) from None

    def _unknown(self, name: str) -> AttributeError:
        hint = did_you_mean(name, type(self).model_fields)
        return AttributeError(f"{type(self).__name__} has no key {name!r}" + (f"; {hint}" if hint else ""))
