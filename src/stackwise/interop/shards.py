"""Safetensors files written tensor by tensor, cut into shards, with the index that says which is where."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stackwise.interop.folder import INDEX, WEIGHTS
from stackwise.storage import ops

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Group:
    """Tensors that are made together: names, shapes and number formats, and how they are made."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    make: Callable[[], Sequence[Tensor]]

    @property
    def size(self) -> int:
        return sum(_bytes(s, d) for s, d in zip(self.shapes, self.dtypes, strict=True))


def write_shards(folder: Path, groups: Sequence[Group], max_bytes: int) -> list[str]:
    """Write all groups, files of at most `max_bytes` where one group is not larger; returns the names of the files.

    Besides what makes them, the tensors of one group are in memory.
    """
    shards: list[list[Group]] = [[]]
    for group in groups:
        if shards[-1] and sum(g.size for g in shards[-1]) + group.size > max_bytes:
            shards.append([])
        shards[-1].append(group)
    if len(shards) == 1:
        _write(folder / WEIGHTS, shards[0])
        return [WEIGHTS]
    stem = WEIGHTS.removesuffix(".safetensors")
    names: list[str] = []
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        names.append(name)
        places |= {tensor: name for group in shard for tensor in group.names}
    total = sum(group.size for group in groups)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    ops.write_new(folder / INDEX, [(json.dumps(index, indent=2) + "\n").encode()], kind="export")
    return [*names, INDEX]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return dtype.itemsize * int(torch.Size(shape).numel())


def _write(path: Path, groups: Sequence[Group]) -> None:
    """8 bytes of header length, a JSON header that gives each tensor's place, then the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for group in groups:
        for name, shape, dtype in zip(group.names, group.shapes, group.dtypes, strict=True):
            end = offset + _bytes(shape, dtype)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with ops.NewFile(path, kind="export") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            for tensor, shape, dtype in zip(group.make(), group.shapes, group.dtypes, strict=True):
                assert tuple(tensor.shape) == shape
                plain = tensor.to("cpu", dtype).contiguous()
                file.write(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
