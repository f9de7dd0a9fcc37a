"""Keys that older files may still hold, translated with one warning."""

import warnings
from typing import Any

from pydantic import BaseModel

from stackwise.config.document import Document
from stackwise.config.errors import Problem
from stackwise.config.shape import Path, dotted, field_at, names_of, source_of, value_at

N_BLOCKS: tuple[Path, ...] = (("model", "n_blocks"), ("model", "architecture", "n_blocks"))
ATTENTION_TYPE: Path = ("model", "attention_type")


def translate_deprecated(document: Document, cls: type[BaseModel]) -> None:
    """Replace the deprecated keys in place, with one DeprecationWarning for all of them.

    `model.n_blocks` and `model.architecture.n_blocks` must equal n_stacks * blocks_per_stack, or
    give n_stacks where that is not set. `model.attention_type` sets the attention override.
    """
    used = []
    for path in N_BLOCKS:
        section = value_at(document.data, path[:-1])
        if isinstance(section, dict) and "n_blocks" in section:
            _translate_n_blocks(document, path, section.pop("n_blocks"), cls)
            used.append(f"{dotted(path)} (write model.architecture.n_stacks and blocks_per_stack)")
    model = document.data.get("model")
    if isinstance(model, dict) and "attention_type" in model:
        _translate_attention_type(document, model, model.pop("attention_type"), cls)
        used.append(f"{dotted(ATTENTION_TYPE)} (write model.attention_overrides.attention_type)")
    if used:
        warnings.warn(f"deprecated: {', '.join(used)}", DeprecationWarning, stacklevel=4)


def _translate_n_blocks(document: Document, path: Path, n_blocks: Any, cls: type[BaseModel]) -> None:
    _, field = field_at(cls, ("model", "architecture", "blocks_per_stack"))
    shape = document.data["model"].setdefault("architecture", {})
    if field is None or not isinstance(shape, dict):
        return  # a section that is no map is reported as such
    per_stack = shape.get("blocks_per_stack", field.default)
    n_stacks = shape.get("n_stacks")
    if not isinstance(n_blocks, int) or n_blocks < 1:
        message, allowed = "wrong value", "whole number >= 1"
    elif not isinstance(per_stack, int) or per_stack < 1 or not isinstance(n_stacks, int | None):
        return  # reported with that key
    elif n_stacks is not None and n_stacks * per_stack != n_blocks:
        message, allowed = "must equal n_stacks * blocks_per_stack", f"{n_stacks} * {per_stack}"
    elif n_blocks % per_stack:
        message, allowed = "must be a multiple of blocks_per_stack", f"multiples of {per_stack}"
    else:
        if n_stacks is None:
            shape["n_stacks"] = n_blocks // per_stack
            document.sources["model", "architecture", "n_stacks"] = source_of(path, document.sources)
        return
    source = source_of(path, document.sources)
    document.problems.append(Problem(dotted(path), message, n_blocks, allowed, "", *source))


def _translate_attention_type(
    document: Document, model: dict[str, Any], value: Any, cls: type[BaseModel]
) -> None:
    target = ("model", "attention_overrides", "attention_type")
    _, field = field_at(cls, target)
    overrides = model.setdefault("attention_overrides", {})
    if field is None or not isinstance(overrides, dict):
        return  # a section that is no map is reported as such
    names = [*names_of(field), "standard"]
    source = source_of(ATTENTION_TYPE, document.sources)
    meant = "mha" if value == "standard" else value
    present = overrides.setdefault("attention_type", meant)
    document.sources.setdefault(target, source)
    if meant not in names:
        overrides.pop("attention_type")
        problem = Problem(dotted(ATTENTION_TYPE), "wrong value", value, ", ".join(names), "", *source)
        document.problems.append(problem)
    elif present != meant:
        message = f"disagrees with {dotted(target)} {present!r}"
        document.problems.append(Problem(dotted(ATTENTION_TYPE), message, value, "", "remove it", *source))
