"""The activation store: boundary outputs of a frozen prefix, one entry [T, D] per sample and draw.

Memory is filled first, then the disk; what finds no place in either is not kept. Shape letters: B samples of a batch,
T tokens, D model width, E bytes of an entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.trunk.budget import Budget
from stackwise.trunk.codec import Codec
from stackwise.trunk.disk import DiskStore
from stackwise.trunk.layout import Header


@dataclass
class StoreStats:
    """Counts of one store since it was opened; entries count once per visit."""

    hits: int = 0
    misses: int = 0
    spills: int = 0
    """Entries that went to disk because the memory was full."""
    dropped: int = 0
    """Entries that found no place."""
    damaged: int = 0
    """Entries whose bytes had changed on the disk."""
    ram_bytes: int = 0
    disk_bytes: int = 0
    entries: int = 0


class ActivationStore:
    """Entries of `n_samples` samples, addressed by the data set's own index and the draw of the corruption.

    `directory` holds one folder per store, named after its key; a folder is made when the first entry goes to disk.
    `key` says in JSON-able fields what the entries are a function of; entries found under another key are never read.
    `dtype` is the stored format (see `codec`); reading gives the dtype that was written. `ram_bytes` and
    `disk_bytes` are limits in bytes, or budgets shared with other stores; memory keeps an eighth free for
    `prefetch`. With `verify` an entry from disk is compared with its checksum when it is first read; one that has
    changed is forgotten with a RuntimeWarning and counts as missing.

    Raises ValueError for a wrong format or shape, CacheError for a folder that belongs to something else.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        key: Mapping[str, Any],
        shape: tuple[int, int],
        n_samples: int,
        ram_bytes: int | Budget,
        disk_bytes: int | Budget,
        dtype: str = "bfloat16",
        draws: int = 1,
        verify: bool = True,
    ) -> None:
        if n_samples < 1 or draws < 1:
            raise ValueError(f"n_samples and draws are at least 1, got {n_samples} and {draws}")
        self.codec = Codec(shape, dtype)
        self.key, self.shape, self.dtype = dict(key), shape, dtype
        self.n_samples, self.draws = n_samples, draws
        self.ram = ram_bytes if isinstance(ram_bytes, Budget) else Budget(ram_bytes)
        budget = disk_bytes if isinstance(disk_bytes, Budget) else Budget(disk_bytes)
        self.name = store_name(self.key, shape, dtype, n_samples, draws)
        self.disk = DiskStore(Path(directory) / self.name, budget, verify=verify)
        self.values: torch.dtype | None = None
        if self.disk.header is not None:
            try:
                self.disk.header.check(self._header(self.disk.header.values), self.disk.folder)
            except BaseException:
                self.disk.close()
                raise
            self.values = getattr(torch, self.disk.header.values)
        self._ram: dict[int, Tensor] = {}
        self._staged: dict[int, Tensor] = {}
        self._reserved = 0  # bytes of memory for what is read ahead
        self._ahead: Future[dict[int, Tensor]] | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._counts = StoreStats()

    # --- entries -----------------------------------------------------------------------------------------------

    def has(self, ids: Tensor, draw: int = 0) -> Tensor:
        """bool [B]: which samples can be read."""
        return torch.tensor([self._there(entry) for entry in self._numbers(ids, draw)], dtype=torch.bool)

    def read(self, ids: Tensor, draw: int = 0, device: torch.device | None = None) -> Tensor | None:
        """[B, T, D] on `device` (null: the CPU) in the dtype that was written; null if any is missing."""
        entries = self._numbers(ids, draw)
        missing = sum(not self._there(entry) for entry in entries)
        if not missing and entries:
            raw = torch.empty(len(entries), self.codec.entry_bytes, dtype=torch.uint8)
            self._receive()
            missing = sum(not self._load_into(entry, row) for entry, row in zip(entries, raw, strict=True))
            if not self._staged:
                self._unstage()
        if missing or not entries:
            self._counts.misses += missing
            return None
        self._counts.hits += len(entries)
        assert self.values is not None
        return self.codec.decode(raw if device is None else raw.to(device), self.values)

    def write(self, ids: Tensor, x_BTD: Tensor, draw: int = 0) -> Tensor:
        """Keep what has room; entries that are there already stay. Returns what reading gives: `x_BTD`, rounded.

        Raises ValueError for a shape, TypeError for a dtype that does not fit the store, IndexError for unknown ids.
        """
        entries = self._numbers(ids, draw)
        if x_BTD.shape != (len(entries), *self.shape):
            raise ValueError(
                f"{len(entries)} entries of {list(self.shape)} expected, got {list(x_BTD.shape)}"
            )
        if not x_BTD.is_floating_point() or x_BTD.dtype.itemsize < 2:
            raise TypeError(f"activations are floating-point numbers, got {x_BTD.dtype}")
        if self.values not in (None, x_BTD.dtype):
            raise TypeError(f"the entries of this store are {self.values}, got {x_BTD.dtype}")
        self.values = x_BTD.dtype
        raw = self.codec.encode(x_BTD.detach())
        rounded = self.codec.decode(raw, x_BTD.dtype)
        for entry, row in zip(entries, raw.cpu(), strict=True):
            if not self._there(entry):
                self._keep(entry, row)
        return rounded

    def discard(self, ids: Tensor, draw: int = 0) -> None:
        """Give back the memory of entries that will not be read again; those on disk stay."""
        for entry in self._numbers(ids, draw):
            if self._ram.pop(entry, None) is not None:
                self.ram.give(self.codec.entry_bytes)

    def prefetch(self, ids: Tensor, draw: int = 0) -> None:
        """Start reading from disk, in the background, what the next `read` will ask for; as far as the memory allows."""
        self._unstage()
        wanted = [e for e in dict.fromkeys(self._numbers(ids, draw)) if e not in self._ram and e in self.disk]
        size = len(wanted) * self.codec.entry_bytes
        if not size or not self.ram.take(size):
            return
        self._reserved = size
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "activations")
        self._ahead = self._worker.submit(self._load_ahead, wanted)

    def __len__(self) -> int:
        """Entries that can be read."""
        return len(self._ram) + len(self.disk)

    @property
    def stats(self) -> StoreStats:
        """A copy of the counts, with the bytes held now."""
        held = {
            "damaged": self.disk.damaged,
            "ram_bytes": len(self._ram) * self.codec.entry_bytes + self._reserved,
            "disk_bytes": self.disk.bytes,
            "entries": len(self),
        }
        return StoreStats(**{**vars(self._counts), **held})

    # --- ending ------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Make every entry on disk durable."""
        self.disk.flush()

    def close(self) -> None:
        """Free the memory; what is on disk stays and can be opened again."""
        self._forget_memory()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self.disk.close()

    def clear(self) -> None:
        """Forget every entry, in memory and on disk. Raises CacheInUseError while another process writes."""
        self._forget_memory()
        self.disk.clear()
        self.values = None

    # --- inside ------------------------------------------------------------------------------------------------

    def _numbers(self, ids: Tensor, draw: int) -> list[int]:
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"sample ids are integers [B], got {ids.dtype} {list(ids.shape)}")
        if not 0 <= draw < self.draws:
            raise IndexError(f"draw {draw} is outside the {self.draws} draws of this store")
        numbers: list[int] = ids.tolist()
        for number in numbers:
            if not 0 <= number < self.n_samples:
                raise IndexError(f"sample {number} is outside a data set of {self.n_samples}")
        return [draw * self.n_samples + number for number in numbers]

    def _there(self, entry: int) -> bool:
        return entry in self._ram or entry in self.disk

    def _keep(self, entry: int, row: Tensor) -> None:
        size = self.codec.entry_bytes
        if self.ram.take(size, leave=self.ram.limit // 8):
            self._ram[entry] = row.clone()
        elif self.disk.put(entry, row.numpy(), self._header(str(self.values).removeprefix("torch."))):
            self._counts.spills += 1
        else:
            self._counts.dropped += 1

    def _load_into(self, entry: int, row: Tensor) -> bool:
        held = self._ram.get(entry)
        if held is None:
            held = self._staged.pop(entry, None)
        if held is None:
            return self.disk.get(entry, row.numpy())
        row.copy_(held)
        return True

    def _load_ahead(self, entries: list[int]) -> dict[int, Tensor]:
        raw = torch.empty(len(entries), self.codec.entry_bytes, dtype=torch.uint8)
        pairs = zip(entries, raw, strict=True)
        return {entry: row for entry, row in pairs if self.disk.get(entry, row.numpy())}

    def _receive(self) -> None:
        """Take over what was read ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._staged = ahead.result()

    def _unstage(self) -> None:
        """Give back the memory of what was read ahead: one piece, freed once nothing of it is left to read."""
        self._receive()
        self._staged = {}
        self.ram.give(self._reserved)
        self._reserved = 0

    def _forget_memory(self) -> None:
        self._unstage()
        self.ram.give(len(self._ram) * self.codec.entry_bytes)
        self._ram = {}

    def _header(self, values: str) -> Header:
        return Header.new(self.key, self.shape, self.n_samples, self.draws, self.dtype, values)


def store_name(key: Mapping[str, Any], shape: tuple[int, int], dtype: str, n_samples: int, draws: int) -> str:
    """Name of the folder of a store: the boundary, where the key has one, and a hash of all that entries depend on."""
    facts = {"key": dict(key), "shape": list(shape), "dtype": dtype, "samples": n_samples, "draws": draws}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return f"b{int(key.get('boundary', 0)):03d}-{digest[:24]}"
