"""What a model folder may ask for: no code, no sizes that its tensors do not have, no more memory than there is."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stackwise.interop.errors import InterchangeError, listed
from stackwise.interop.family import Family
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.storage.errors import UnsafeInputError
from stackwise.tracking.environment import memory_bytes

if TYPE_CHECKING:
    from stackwise.interop.folder import ModelFolder

_CODE = re.compile(r"auto_map|.*remote_code|custom_pipelines?|.*_class_path|.*(import|module)_path")
"""Keys that name code to load."""
_BACKEND = re.compile(r"\w*_implementation(_internal)?")
"""Keys that name a backend by a plain word; some readers take anything else for code to fetch."""
_MAX_NUMBER = 2**53
_SIZES = {"vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim"}
"""Keys of `model.*` that are dimensions of tensors, or their number."""


def check_config(data: Any, where: str) -> None:
    """Raise UnsafeInputError for a description that names code, or holds a number that no model has."""
    if isinstance(data, dict):
        for key, value in data.items():
            if _CODE.fullmatch(key) and value:
                raise UnsafeInputError(
                    f"{where}: {key} names code to run, so the model is refused; no code of a model folder is ever run. "
                    "If its tensors are those of a known family, take the key out"
                )
            if _BACKEND.fullmatch(key):
                names = value.values() if isinstance(value, dict) else (value,)
                if not all(
                    name is None or (isinstance(name, str) and re.fullmatch(r"\w*", name)) for name in names
                ):
                    raise UnsafeInputError(f"{where}: {key} must be a plain name, got {value!r:.200}")
            check_config(value, where)
    elif isinstance(data, list):
        for value in data:
            check_config(value, where)
    elif isinstance(data, int) and abs(data) > _MAX_NUMBER:
        raise UnsafeInputError(f"{where}: {data:.3e} is no size that a model can have")


def check_sizes(family: Family, folder: ModelFolder) -> None:
    """Refuse sizes that the tensors do not have, before anything is made of that size."""
    largest = max((size for shape in folder.shapes.values() for size in shape), default=0)
    for key in family.keys:
        value = folder.config.get(key.theirs)
        if key.ours not in _SIZES or not isinstance(value, int):
            continue
        limit, of = (
            (len(folder.shapes), "tensors") if key.ours == "n_layers" else (largest, "rows or columns")
        )
        if value > limit:
            raise InterchangeError(
                f"{folder.path}: {key.theirs} is {value:,}, but the weights have {limit:,} {of} at most"
            )


def check_room(spec: RackSpec, folder: ModelFolder) -> None:
    """Refuse a model of more experts than tensors, or one that this machine cannot hold."""
    experts = sum(block.experts.n_experts for block in spec.blocks if block.experts is not None)
    if experts > len(folder.shapes):
        raise InterchangeError(
            f"{folder.path} describes {experts:,} experts, but the weights are {len(folder.shapes):,} tensors"
        )
    needed, memory = 4 * sum(prod(shape) for shape in folder.shapes.values()), memory_bytes()
    if memory is not None and needed > memory:
        raise InterchangeError(
            f"{folder.path} takes {needed / 1e9:.1f} GB as float32, and this machine has {memory / 1e9:.1f} GB of memory"
        )


def check_finite_values(rack: Rack, folder: Path) -> None:
    """Refuse weights with values that are NaN or infinite."""
    bad = [name for name, tensor in rack.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise InterchangeError(
            listed(f"{folder}: weights that are not finite numbers, by their names here:", bad)
        )
