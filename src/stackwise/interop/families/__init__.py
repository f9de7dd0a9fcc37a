"""The families, one small file each; a new one is added to MODULES."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from stackwise.config.errors import did_you_mean
from stackwise.interop.errors import InterchangeError
from stackwise.interop.family import Family

MODULES = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "bert",
    "modernbert",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gemma2",
    "gemma3",
)
"""In the order in which a rack is compared with them for export."""


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """All families by the `model_type` of their config.json."""
    listed = [import_module(f"{__name__}.{name}").FAMILY for name in MODULES]
    return {family.model_type: family for family in listed}


def family_of(model_type: object, where: str) -> Family:
    """The family of a config.json; another one is an InterchangeError with the known ones."""
    known = families()
    if not isinstance(model_type, str) or model_type not in known:
        hint = did_you_mean(model_type, known) if isinstance(model_type, str) else ""
        raise InterchangeError(
            f"{where}: model_type {model_type!r} is no family that can be read; known: {', '.join(known)}"
            + (f"; {hint}" if hint else "")
        )
    return known[model_type]
