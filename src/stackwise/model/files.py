"""Weights as single safetensors files: for handing a stack or a rack around. Runs use the checkpoint store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stackwise.storage import ops
from stackwise.storage.errors import DamagedFileError
from stackwise.storage.header import Header, read_header
from stackwise.storage.tensors import encode


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


def load_tensors(path: str | Path, *, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a file. Raises as `open_tensors`; of another kind than asked: ValueError."""
    path = Path(path)
    with open_tensors(path) as file:
        facts = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if kind is not None and facts.get("kind") != kind:
        raise ValueError(f"{path} holds {facts.get('kind', 'no stackwise weights')!r}, not a {kind}")
    return tensors, facts
