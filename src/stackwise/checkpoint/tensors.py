"""Tensors as safetensors bytes, written the same way every time and read with suspicion.

The format: 8 bytes with the header's length (little endian), a JSON header that gives each tensor's
dtype, shape and place, then the tensors' bytes. The safetensors library orders several metadata keys
by chance and copies every tensor twice; here one metadata key is written, tensors are ordered by item
size and name, and the bytes of the tensors in memory are hashed and written without a copy. Any
safetensors reader can open the files.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors name -> torch dtype, for every dtype that can be stored."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9._:/-]{1,512}")
_MAX_HEADER = 16 * 2**20
_MAX_TENSORS = 100_000
_MAX_RANK = 8
_MAX_DIM = 2**31


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    name: str
    dtype: str
    """safetensors name, such as `BF16`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """The bytes of one safetensors file, still in the memory of the tensors themselves."""

    chunks: list[bytes | memoryview]
    sha256: str
    size: int
    tensors: tuple[TensorInfo, ...]
    """In the order of the file."""


def check_name(name: str, what: str) -> None:
    """Raise ValueError unless `name` is safe in a file and on a terminal."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{what} {name!r}: only letters, digits and . _ : / - without '..', 512 characters at most"
        )


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first tensor whose name, layout or dtype cannot be stored."""
    for name, tensor in tensors.items():
        check_name(name, "tensor")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPE_NAMES or tensor.device.type == "meta":
            raise ValueError(
                f"tensor {name!r} cannot be stored ({tensor.layout}, {tensor.dtype}, device {tensor.device}): "
                f"it must be dense, hold data, and be one of {', '.join(DTYPES)}"
            )


def encode(tensors: Mapping[str, Tensor]) -> Encoded:
    """The safetensors bytes of `tensors` (any device, any strides) and their SHA-256.

    The same names and values give the same bytes, in any process and whatever the order of the
    mapping. The chunks share memory with tensors that are on the CPU and contiguous: use them before
    the tensors change. Raises ValueError for a name or tensor that cannot be stored.
    """
    _require_little_endian()
    check_tensors(tensors)
    # The widest items first, so that each tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes | memoryview] = []
    offset = 0
    for name in order:
        tensor = tensors[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
        chunks.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    table = _table(text, offset)  # what is written can be read back: the same checks
    chunks.insert(0, len(text).to_bytes(8, "little") + text)
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    infos = tuple(TensorInfo(name, dtype, shape) for name, dtype, shape, _, _ in table)
    return Encoded(chunks, digest.hexdigest(), 8 + len(text) + offset, infos)


def decode(buffer: bytearray) -> dict[str, Tensor]:
    """The CPU tensors in a safetensors file; they share the memory of `buffer`.

    Raises ValueError unless the header accounts for every byte: known dtypes, sizes that fit the
    shapes, no hole, no overlap, no duplicate, no unknown field.
    """
    _require_little_endian()
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or length > len(buffer) - 8 or length % 8:
        raise ValueError(f"the header does not fit: {length} bytes announced in a file of {len(buffer)}")
    start = 8 + length
    tensors = {}
    for name, dtype, shape, begin, end in _table(bytes(buffer[8:start]), len(buffer) - start):
        if begin == end:  # frombuffer refuses an empty range
            tensors[name] = torch.empty(shape, dtype=DTYPES[dtype])
        else:
            flat = torch.frombuffer(buffer, dtype=torch.uint8, count=end - begin, offset=start + begin)
            tensors[name] = flat.view(DTYPES[dtype]).reshape(shape)
    return tensors


def _table(header: bytes, data_size: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """(name, dtype, shape, begin, end) of each tensor in file order, or ValueError."""
    if len(header) > _MAX_HEADER:
        raise ValueError(f"the header has {len(header)} bytes, {_MAX_HEADER} at most")
    try:
        fields = json.loads(header.decode(), object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError("the header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ does not map names to texts")
    if len(fields) > _MAX_TENSORS:
        raise ValueError(f"{len(fields)} tensors, {_MAX_TENSORS} at most")
    table = []
    for name, field in fields.items():
        check_name(name, "tensor")
        if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if not _whole_numbers(shape) or len(shape) > _MAX_RANK or max(shape, default=0) > _MAX_DIM:
            raise ValueError(f"tensor {name!r} has an impossible shape")
        if not _whole_numbers(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {name!r} has impossible offsets")
        begin, end = offsets
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"tensor {name!r}: {end - begin} bytes do not fit the shape {shape} of {dtype}")
        if begin % DTYPES[dtype].itemsize:
            raise ValueError(f"tensor {name!r} is not aligned")
        table.append((name, dtype, tuple(shape), begin, end))
    table.sort(key=lambda row: (row[3], row[4]))
    expected = 0
    for name, _, _, begin, end in table:
        if begin != expected:
            raise ValueError(f"tensor {name!r} starts at byte {begin}, expected {expected}")
        expected = end
    if expected != data_size:
        raise ValueError(f"the tensors end at byte {expected}, the file holds {data_size}")
    return table


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("the header names something twice")
    return fields


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise ValueError("checkpoints can be read and written on little-endian machines only")
