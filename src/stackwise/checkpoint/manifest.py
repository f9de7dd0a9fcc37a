"""The record of one commit: canonical JSON that lists every object, so each commit stands alone.

A manifest is named `<step:09d>-<first 16 hex digits of its SHA-256>.json` and holds

    format, number, step, parent, pin, bytes_written, meta,
    objects: [{part, sha256, size, tensors: [{name, dtype, shape}]}]

with sorted keys, no blanks and ASCII only, so equal commits of equal histories are equal bytes: the
hash of a manifest pins a whole model. There is no clock in it. `number` counts the commits of the
store and is what orders them; steps may repeat (a run that went back to an older commit).

Floats in `meta` are exact: JSON gets the shortest decimal that reads back as the same double.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackwise.checkpoint.errors import VersionError
from stackwise.storage.header import check_name
from stackwise.storage.tensors import TensorInfo

FORMAT = 1
FILE_NAME = re.compile(r"(\d{9})-([0-9a-f]{16})\.json")
MAX_BYTES = 16 * 2**20
MAX_STEP = 10**9 - 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """One named group of tensors in a commit, stored as one object."""

    name: str
    sha256: str
    """Hash of the object's bytes, and its name in the store."""
    bytes: int
    """Size of the object."""
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Commit:
    """One whole state of a run."""

    id: str
    """`<step:09d>-<16 hex digits>`, the name of its manifest."""
    step: int
    number: int
    """Place in the order of commits of this store, from 1."""
    sha256: str
    """Hash of the manifest; it pins every byte of the commit."""
    parent: str | None
    """`sha256` of the commit that this one continues."""
    pin: str | None
    """Name under which pruning keeps it, such as `stage-02`."""
    parts: Mapping[str, Part]
    bytes_written: int
    """Object bytes that were new with this commit (the manifest, a few KB, is not counted)."""
    path: Path
    """The manifest."""
    time: float = field(compare=False)
    """When it was written, seconds since 1970, for people: nothing depends on it."""
    repaired: tuple[str, ...] = field(default=(), compare=False)
    """Parts whose object lay damaged in the store and was written anew. Only what `Store.commit` returns
    knows it."""

    @property
    def bytes_total(self) -> int:
        """Bytes of all objects, shared ones once."""
        return sum({part.sha256: part.bytes for part in self.parts.values()}.values())


def serialize(
    *,
    number: int,
    step: int,
    parent: str | None,
    pin: str | None,
    bytes_written: int,
    meta: dict[str, Any],
    parts: Mapping[str, Part],
) -> tuple[str, bytes]:
    """(commit id, manifest bytes)."""
    record = {
        "format": FORMAT,
        "number": number,
        "step": step,
        "parent": parent,
        "pin": pin,
        "bytes_written": bytes_written,
        "meta": meta,
        "objects": [
            {
                "part": part.name,
                "sha256": part.sha256,
                "size": part.bytes,
                "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in part.tensors],
            }
            for part in sorted(parts.values(), key=lambda part: part.name)
        ],
    }
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_BYTES:
        raise ValueError(
            f"the manifest has {len(text):,} bytes, {MAX_BYTES:,} at most: keep tensors out of meta"
        )
    return f"{step:09d}-{hashlib.sha256(text).hexdigest()[:16]}", text


def parse(path: Path, text: bytes | bytearray, time: float) -> tuple[Commit, dict[str, Any]]:
    """The commit and its meta. Raises ValueError when the bytes are not what the name says."""
    digest = hashlib.sha256(text).hexdigest()
    named = FILE_NAME.fullmatch(path.name)
    if named is None or digest[:16] != named[2]:
        raise ValueError(f"its SHA-256 starts with {digest[:16]}, not with what its name says")
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise VersionError(
                f"{path} is in format {record['format']}; this version reads format {FORMAT}. "
                "Use the StackWise that wrote it, or a newer one.",
                path=path,
            )
        parts = {}
        for item in record["objects"]:
            check_name(item["part"], "part")
            if not _SHA256.fullmatch(item["sha256"]) or item["part"] in parts:
                raise ValueError(f"part {item['part']!r} is listed wrongly")
            infos = tuple(_info(tensor) for tensor in item["tensors"])
            parts[item["part"]] = Part(item["part"], item["sha256"], _count(item["size"]), infos)
        if _count(record["step"]) != int(named[1]):
            raise ValueError(f"it says step {record['step']}")
        parent, pin, meta = record["parent"], record["pin"], record["meta"]
        if parent is not None and not _SHA256.fullmatch(parent):
            raise ValueError(f"its parent is {parent!r:.80}")
        if pin is not None:
            check_name(pin, "pin")
        if not isinstance(meta, dict):
            raise ValueError(f"its meta is {meta!r:.80}")
        commit = Commit(
            id=path.stem,
            step=record["step"],
            number=_count(record["number"]),
            sha256=digest,
            parent=parent,
            pin=pin,
            parts=parts,
            bytes_written=_count(record["bytes_written"]),
            path=path,
            time=time,
        )
        return commit, meta
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a manifest ({error!r})") from error


def _info(tensor: dict[str, Any]) -> TensorInfo:
    name, dtype, shape = tensor["name"], tensor["dtype"], tensor["shape"]
    check_name(name, "tensor")
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError(f"tensor {name!r} is listed wrongly")
    return TensorInfo(name, dtype, tuple(_count(size) for size in shape))


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is no number of anything")
    return value


def check_meta(value: object, where: str = "meta") -> None:
    """Raise ValueError unless `value` comes back from JSON as it went in (tuples come back as lists)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} must be text; JSON would change it")
            check_meta(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_meta(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not a JSON number; use null")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise ValueError(f"{where}: {type(value).__name__} is not JSON; put tensors into parts")
