"""The header of a safetensors file, read with suspicion before anything else touches the file.

The format: 8 bytes with the header's length (little endian), a JSON header that gives each tensor's dtype, shape and
place, then the tensors' bytes. The safetensors library takes two tensors of one name, unknown fields, any name, ranks
of a million and headers of 100 MB; here none of them passes. No byte of a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stackwise.storage.errors import DamagedFileError, UnsafeInputError
from stackwise.storage.regular import open_regular, unique_names

OWN_DTYPES = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
"""safetensors name -> bits of an element, for every dtype that checkpoints store."""
DTYPES = {
    **OWN_DTYPES,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "C64": 64,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""The same for files of others."""
MAX_HEADER = 16 * 2**20
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_DIM = 2**31

_NAME = re.compile(r"[A-Za-z0-9._:/-]{1,512}")
_OTHERS = {
    b"PK\x03\x04": "a zip archive, which is how torch.save writes pickles",
    b"\x93NUM": "a NumPy file",
    b"\x1f\x8b": "compressed by gzip",
    **{bytes([0x80, protocol]): "a pickle" for protocol in (2, 3, 4, 5)},
}
"""First bytes of files that are sometimes put in the place of weights."""


class Row(NamedTuple):
    """One tensor of a file: its bytes are `begin` to `end` of what follows the header."""

    name: str
    dtype: str
    """safetensors name, such as `BF16`."""
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What is known of a file without reading a tensor. `rows` by name, in the order of the file."""

    rows: Mapping[str, Row]
    metadata: Mapping[str, str]


def check_name(name: str, what: str) -> None:
    """Raise UnsafeInputError unless `name` is safe in a file and on a terminal."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise UnsafeInputError(
            f"{what} {name!r:.600}: only letters, digits and . _ : / - without '..', 512 characters at most"
        )


def read_header(path: Path) -> Header:
    """The checked header of a file. Raises FileNotFoundError, DamagedFileError and UnsafeInputError naming the file."""
    fd = open_regular(path)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        try:
            check_length(start, size)
            return parse_header(file.read(length), size - 8 - length, foreign=True)
        except (DamagedFileError, UnsafeInputError) as error:
            raise type(error)(f"{path} is no readable safetensors file: {error}") from None


def check_length(start: bytes, size: int) -> None:
    """Raise unless the first 8 bytes of a file of `size` bytes announce a header that fits."""
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        raise DamagedFileError(f"the file has {size} bytes, too few for a header")
    if length > min(MAX_HEADER, size - 8):
        other = next((kind for magic, kind in _OTHERS.items() if start.startswith(magic)), None)
        if other is not None:
            raise UnsafeInputError(f"it is {other}, and is not opened")
    if length > MAX_HEADER:
        raise UnsafeInputError(f"the header has {length} bytes, {MAX_HEADER} at most")
    if length > size - 8:
        raise DamagedFileError(f"the header does not fit: {length} bytes announced in a file of {size}")


def parse_header(text: bytes, data_size: int, *, foreign: bool = False) -> Header:
    """The tensors that a header describes, which must account for each of `data_size` bytes once.

    With `foreign` tensors need not be aligned, and dtypes are those that other programs write. Raises
    DamagedFileError where header and size do not agree, UnsafeInputError for all else.
    """
    # Before a list or a dict is built: every tensor needs a bracket and a handful of commas.
    if len(text) > MAX_HEADER or text.count(b"{") > MAX_TENSORS + 2 or text.count(b",") > 10 * MAX_TENSORS:
        raise UnsafeInputError(
            f"the header describes more than {MAX_TENSORS} tensors, or has {len(text)} bytes"
        )
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique_names)
    except UnsafeInputError:
        raise
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"the header is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UnsafeInputError(f"the header is no plain JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UnsafeInputError("the header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeInputError("__metadata__ does not map names to texts")
    dtypes = DTYPES if foreign else OWN_DTYPES
    rows = [_row(name, field, dtypes, aligned=not foreign) for name, field in fields.items()]
    rows.sort(key=lambda row: (row.begin, row.end))
    expected = 0
    for row in rows:
        if row.begin != expected:
            raise UnsafeInputError(f"tensor {row.name!r} starts at byte {row.begin}, expected {expected}")
        expected = row.end
    if expected != data_size:
        raise DamagedFileError(f"the tensors end at byte {expected}, the file holds {data_size}")
    return Header({row.name: row for row in rows}, metadata)


def _row(name: str, field: object, dtypes: Mapping[str, int], *, aligned: bool) -> Row:
    check_name(name, "tensor")
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise UnsafeInputError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise UnsafeInputError(
            f"tensor {name!r} has the unknown dtype {dtype!r:.80}; known: {', '.join(dtypes)}"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_RANK or max(shape, default=0) > MAX_DIM:
        raise UnsafeInputError(f"tensor {name!r} has an impossible shape")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise UnsafeInputError(f"tensor {name!r} has impossible offsets")
    begin, end = offsets
    bits = dtypes[dtype]
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise UnsafeInputError(
            f"tensor {name!r}: {end - begin} bytes do not fit the shape {shape} of {dtype}"
        )
    if aligned and begin % (bits // 8):
        raise UnsafeInputError(f"tensor {name!r} is not aligned")
    return Row(name, dtype, tuple(shape), begin, end)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
