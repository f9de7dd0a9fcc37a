"""Named parts: attention, feed-forward layers, norms and positions, looked up by name.

Registering a part of your own takes five lines; its name then works in every config:

    from stackwise.model.registry import FEED_FORWARDS

    @FEED_FORWARDS.register("my_ffn")
    class MyFeedForward(torch.nn.Module):
        def __init__(self, spec): ...   # a BlockSpec

This file imports no torch, so that configs are checked without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from stackwise.model.attention_settings import ATTENTION_TYPES
from stackwise.model.settings import FFN_TYPES, NORMS, POSITIONS

T = TypeVar("T")


class Registry:
    """Constructors by name. The built-in names are those the config accepts; their module is imported on first use."""

    def __init__(self, kind: str, names: list[str] | dict[str, bool], module: str) -> None:
        self.kind = kind
        self._names = names  # shared with the config, so that a registered name is accepted there
        self._module = module
        self._entries: dict[str, Any] = {}

    def names(self) -> list[str]:
        """All names that can be asked for, built-in ones first."""
        return list(self._names)

    def register(self, name: str, *, gated: bool = False) -> Callable[[T], T]:
        """Decorator that files a constructor under `name`. A name can be taken only once (ValueError).

        `gated` concerns feed-forward layers: a gated one defaults to 8/3 of the model width, others to 4 times.
        """

        def file(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = entry
            if isinstance(self._names, dict):
                self._names.setdefault(name, gated)
            elif name not in self._names:
                self._names.append(name)
            return entry

        return file

    def get(self, name: str) -> Any:
        """The constructor filed under `name`; an unknown name is a ValueError that lists the known ones."""
        if name in self._names and name not in self._entries:
            import_module(self._module)
        if name not in self._entries:
            close = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}{hint}")
        return self._entries[name]


ATTENTIONS = Registry("attention type", ATTENTION_TYPES, "stackwise.model.attention")
FEED_FORWARDS = Registry("feed-forward type", FFN_TYPES, "stackwise.model.feed_forward")
NORM_LAYERS = Registry("norm", NORMS, "stackwise.model.norms")
POSITION_LAYERS = Registry("position encoding", POSITIONS, "stackwise.model.positions")
