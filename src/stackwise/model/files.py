"""Weights as single safetensors files: for handing a stack or a rack around. Runs use the checkpoint store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stackwise.storage import ops
from stackwise.storage.errors import CheckpointError, DamagedFileError
from stackwise.storage.header import Header, read_header
from stackwise.storage.tensors import encode

VERSION = "1"
"""Of the files of stacks and racks."""


def save_tensors(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> Path:
    """Write tensors and facts to one file, whole or not at all; returns the path."""
    path = Path(path)
    ops.make_dir(path.parent)
    ops.write_atomic(path, encode(tensors, facts).chunks, kind="text")
    ops.sync_dir(path.parent)
    return path


@contextmanager
def open_tensors(path: Path, header: Header | None = None) -> Iterator[Any]:
    """A safetensors file, opened by the library after its header passed; `header`: what `read_header` gave before.

    Raises FileNotFoundError, DamagedFileError for a file that is not whole, UnsafeInputError for what is refused.
    """
    if header is None:
        read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is no readable safetensors file: {error}") from None


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a file. Raises as `open_tensors`."""
    with open_tensors(Path(path)) as file:
        facts = file.metadata() or {}
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no mapping


def save_weights(path: str | Path, tensors: dict[str, Tensor], *, kind: str, spec: dict[str, Any]) -> Path:
    """Write a stack or a rack with its description and the hash of both; returns the path."""
    text = json.dumps(spec)
    facts = {"kind": kind, "spec": text, "version": VERSION, "sha256": _sha256(tensors, text)}
    return save_tensors(path, tensors, facts)


def load_weights(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description from a file of `save_weights`.

    Missing: FileNotFoundError. Damaged, of another kind, or of another version: CheckpointError. What must not be read:
    UnsafeInputError.
    """
    path = Path(path)
    try:
        tensors, facts = load_tensors(path)
        text = facts.get("spec", "{}")
        spec = json.loads(text)
    except (DamagedFileError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{error}. Save the {kind} again, or copy the file again", path=path) from error
    if facts.get("kind") != kind:
        found = facts.get("kind", "no stackwise weights")
        raise CheckpointError(f"{path} holds {found!r}, not a {kind}", path=path)
    if facts.get("version", VERSION) != VERSION:
        raise CheckpointError(
            f"{path} is in version {facts['version']!r}, this StackWise reads {VERSION}; use the one that wrote it",
            path=path,
        )
    if facts.get("sha256", found := _sha256(tensors, text)) != found:
        raise CheckpointError(
            f"{path} is damaged: the {kind} does not have the hash that was stored with it. Copy the file again",
            path=path,
            part=kind,
        )
    return tensors, spec


def _sha256(tensors: dict[str, Tensor], spec: str) -> str:
    """Of the description, and of names and bytes, whatever the order."""
    digest = hashlib.sha256(spec.encode())
    for name in sorted(tensors):
        digest.update(encode({name: tensors[name]}).sha256.encode())
    return digest.hexdigest()
