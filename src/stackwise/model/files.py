"""Weights as single safetensors files: for handing a stack or a rack around. Runs use the checkpoint store."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stackwise.storage import ops


def save_tensors(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> Path:
    """Write tensors and facts to one file, whole or not at all; returns the path."""
    path = Path(path)
    ops.make_dir(path.parent)
    held = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, facts)
    ops.write_atomic(path, [held], kind="text")
    ops.sync_dir(path.parent)
    return path


def load_tensors(path: str | Path, *, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a file. Missing: FileNotFoundError; damaged, or of another kind than asked: ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    if kind is not None and facts.get("kind") != kind:
        raise ValueError(f"{path} holds {facts.get('kind', 'no stackwise weights')!r}, not a {kind}")
    return tensors, facts
