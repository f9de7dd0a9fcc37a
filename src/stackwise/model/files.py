"""Weights as single safetensors files: for handing a stack or a rack around. Runs use the checkpoint store."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> Path:
    """Write tensors and facts to one file, whole or not at all; returns the path."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, facts)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
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
