"""Tensors as safetensors bytes, written the same way every time and read with suspicion.

The format: 8 bytes with the header's length (little endian), a JSON header that gives each tensor's
dtype, shape and place, then the tensors' bytes. The safetensors library orders several metadata keys
by chance and copies every tensor twice; here one metadata key is written, tensors are ordered by item
size and name, and the bytes of the tensors in memory are hashed and written without a copy. Any
safetensors reader can open the files.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stackwise.storage.header import check_length, check_name, parse_header

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


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first tensor whose name, layout or dtype cannot be stored."""
    for name, tensor in tensors.items():
        check_name(name, "tensor")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPE_NAMES or tensor.device.type == "meta":
            raise ValueError(
                f"tensor {name!r} cannot be stored ({tensor.layout}, {tensor.dtype}, device {tensor.device}): "
                f"it must be dense, hold data, and be one of {', '.join(DTYPES)}"
            )


def encode(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> Encoded:
    """The safetensors bytes of `tensors` (any device, any strides) and their SHA-256.

    `facts` go into the metadata; null: that the tensors are PyTorch's. The same names and values give the same bytes, in any process and whatever the order of the
    mapping. The chunks share memory with tensors that are on the CPU and contiguous: use them before
    the tensors change. Raises ValueError for a name or tensor that cannot be stored.
    """
    _require_little_endian()
    check_tensors(tensors)
    # The widest items first, so that each tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {
        "__metadata__": {"format": "pt"} if facts is None else dict(sorted(facts.items()))
    }
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
    rows = parse_header(text, offset).rows.values()  # what is written can be read back: the same checks
    chunks.insert(0, len(text).to_bytes(8, "little") + text)
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    infos = tuple(TensorInfo(row.name, row.dtype, row.shape) for row in rows)
    return Encoded(chunks, digest.hexdigest(), 8 + len(text) + offset, infos)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two CPU tensors are alike in dtype, shape and every bit (NaN equals itself, -0 is not 0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def decode(buffer: bytearray) -> dict[str, Tensor]:
    """The CPU tensors in a safetensors file; they share the memory of `buffer`.

    Raises ValueError unless the header accounts for every byte: known dtypes, sizes that fit the
    shapes, no hole, no overlap, no duplicate, no unknown field.
    """
    _require_little_endian()
    check_length(bytes(buffer[:8]), len(buffer))
    start = 8 + int.from_bytes(buffer[:8], "little")
    if start % 8:
        raise ValueError(f"the tensors start at byte {start}, which is not aligned")
    tensors = {}
    header = parse_header(bytes(buffer[8:start]), len(buffer) - start)
    for name, dtype, shape, begin, end in header.rows.values():
        if begin == end:  # frombuffer refuses an empty range
            tensors[name] = torch.empty(shape, dtype=DTYPES[dtype])
        else:
            flat = torch.frombuffer(buffer, dtype=torch.uint8, count=end - begin, offset=start + begin)
            tensors[name] = flat.view(DTYPES[dtype]).reshape(shape)
    return tensors


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise ValueError("checkpoints can be read and written on little-endian machines only")
