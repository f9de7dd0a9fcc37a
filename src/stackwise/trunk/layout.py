"""The files of one store of activations.

    store.json        what the entries are: key, shape, formats (see `Header`)
    shard-00000.bin   slots of equal size, one entry in each, `per_shard` of them
    index.bin         records of 24 bytes: entry, slot, CRC-32 of the entry's bytes, CRC-32 of the record
    LOCK              who may write

An entry's number is draw * n_samples + sample. The index gets a record only after the bytes of its entry are on the
disk, so a crash at any moment loses the youngest entries at most and never leaves half of one. Later records win.
"""

from __future__ import annotations

import json
import re
import struct
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stackwise.trunk import files
from stackwise.trunk.errors import CacheError

FORMAT = "stackwise-activations"
VERSION = 1
SHARD_BYTES = 256 * 2**20
"""Shards hold as many whole entries as fit, at least one."""

STORED = ("float32", "bfloat16", "fp8")
"""Number formats of a store."""

RECORD = struct.Struct("<QQII")
_MAX_HEADER = 2**20

Index = dict[int, tuple[int, int]]
"""entry -> (slot, CRC-32 of its bytes)"""


@dataclass(frozen=True)
class Header:
    """What is in store.json. `values`: dtype of the tensors before storing, in which they are read again."""

    key: dict[str, Any]
    shape: tuple[int, int]
    n_samples: int
    draws: int
    dtype: str
    values: str
    per_shard: int
    created: float = field(compare=False)

    @property
    def entry_bytes(self) -> int:
        return entry_bytes(self.shape, self.dtype)

    def place(self, slot: int) -> tuple[int, int]:
        """Number of the shard and first byte in it."""
        shard, at = divmod(slot, self.per_shard)
        return shard, at * self.entry_bytes

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, sort_keys=True)

    def check(self, wanted: Header, folder: Path) -> None:
        """Raise CacheError unless the store was written under the same key, shape and format."""
        for name in ("key", "shape", "n_samples", "draws", "dtype"):
            found, want = getattr(self, name), getattr(wanted, name)
            if found != want:
                raise CacheError(
                    f"{folder} was written for another {name} ({found!r}, wanted {want!r}), so its activations are "
                    f"not those of this run. {clear_hint(folder)}",
                    path=folder,
                )

    @classmethod
    def new(
        cls, key: dict[str, Any], shape: tuple[int, int], n_samples: int, draws: int, dtype: str, values: str
    ) -> Header:
        """The header of a store that begins now."""
        per_shard = max(1, SHARD_BYTES // entry_bytes(shape, dtype))
        return cls(key, shape, n_samples, draws, dtype, values, per_shard, time.time())

    @classmethod
    def read(cls, folder: Path) -> Header:
        """Raises CacheError when the file is not the header of a store, FileNotFoundError when there is none."""
        path = folder / "store.json"
        with open(files.open_file(path), "rb") as stream:
            text = stream.read(_MAX_HEADER)
        try:
            fields = json.loads(text)
            if (fields.pop("format"), fields.pop("version")) != (FORMAT, VERSION):
                raise ValueError("of another format")
            header = cls(**{**fields, "shape": tuple(fields["shape"])})
            numbers = (*header.shape, header.n_samples, header.draws, header.per_shard)
            if len(header.shape) != 2 or any(type(n) is not int or n < 1 for n in numbers):
                raise ValueError("impossible sizes")
            if header.dtype not in STORED or not re.fullmatch(r"float(16|32|64)|bfloat16", header.values):
                raise ValueError("unknown number formats")
            if not isinstance(header.key, dict) or not isinstance(header.created, int | float):
                raise ValueError("wrong fields")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(
                f"{path} is not the header of an activation store ({error}). {clear_hint(folder)}", path=path
            ) from error
        return header


def record(entry: int, slot: int, crc: int) -> bytes:
    """One record of the index."""
    head = RECORD.pack(entry, slot, crc, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


def read_index(folder: Path, header: Header) -> tuple[Index, int, int]:
    """The entries, how many records are damaged, and how many there are. One cut short by a crash does not count."""
    path = folder / "index.bin"
    if not path.exists():
        return {}, 0, 0
    with open(files.open_file(path), "rb") as stream:
        data = stream.read()
    count, bad = len(data) // RECORD.size, 0
    entries: Index = {}
    for at in range(0, count * RECORD.size, RECORD.size):
        entry, slot, crc, check = RECORD.unpack_from(data, at)
        if check != zlib.crc32(data[at : at + RECORD.size - 4]) or entry >= header.n_samples * header.draws:
            bad += 1
        else:
            entries[entry] = (slot, crc)
    return entries, bad, count


def entry_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Bytes of one sample's boundary output [T, D]; fp8 has a scale of 4 bytes per token."""
    tokens, width = shape
    return tokens * width * {"float32": 4, "bfloat16": 2, "fp8": 1}[dtype] + (
        4 * tokens if dtype == "fp8" else 0
    )


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.bin"


def file_size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a store."""
    return sum(file_size(path) for path in folder.iterdir())


def clear_hint(folder: Path) -> str:
    """How to get rid of a store."""
    return f"Remove it with `stackwise cache clear {folder.parent} --store {folder.name}`"
