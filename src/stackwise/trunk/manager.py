"""The stores of a run and of a folder: one budget of memory, one of disk, and who has to make room."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stackwise.trunk.budget import Budget
from stackwise.trunk.decide import Room
from stackwise.trunk.errors import CacheInUseError
from stackwise.trunk.listing import list_stores, remove_store
from stackwise.trunk.settings import TrunkKeys
from stackwise.trunk.store import ActivationStore, StoreStats, store_name

FREE_SHARE = 0.8
"""Share of the free disk that stores may take where nothing else is said."""


class MemoryManager:
    """Opens activation stores under a common budget and makes room by removing the oldest.

    `max_bytes` limits all stores in `directory` together, those of earlier runs included (null: 80 % of the disk that
    is free or taken by them); `ram_bytes` limits the memory of the stores opened here. Before an entry is refused,
    whole stores that nobody uses are removed, the one used longest ago first.
    """

    def __init__(
        self,
        max_bytes: int | None,
        directory: str | Path,
        *,
        ram_bytes: int = 1_000_000_000,
        dtype: str = "bfloat16",
    ) -> None:
        self.directory, self.dtype = Path(directory), dtype
        self._stores: dict[str, ActivationStore] = {}
        self._others = {info.name: info.bytes for info in list_stores(self.directory)}
        used = sum(self._others.values())
        limit = int(FREE_SHARE * (free_bytes(self.directory) + used)) if max_bytes is None else max_bytes
        self.ram = Budget(ram_bytes)
        self.disk = Budget(limit, used, self._make_room)
        self._evicted = 0
        self._past = StoreStats()

    @classmethod
    def of(cls, keys: TrunkKeys) -> MemoryManager:
        """As the configuration says."""
        return cls(
            keys.cache_max_bytes, keys.cache_dir, ram_bytes=keys.cache_ram_bytes, dtype=keys.cache_dtype
        )

    def open(
        self, key: Mapping[str, Any], shape: tuple[int, int], n_samples: int, draws: int = 1
    ) -> ActivationStore:
        """The store of a key, opened once; see `ActivationStore`."""
        name = store_name(key, shape, self.dtype, n_samples, draws)
        if name not in self._stores:
            self.disk.give(self._others.pop(name, 0))  # the store counts its bytes itself
            self._stores[name] = ActivationStore(
                self.directory,
                key=key,
                shape=shape,
                n_samples=n_samples,
                draws=draws,
                dtype=self.dtype,
                ram_bytes=self.ram,
                disk_bytes=self.disk,
            )
        return self._stores[name]

    def find(
        self, key: Mapping[str, Any], shape: tuple[int, int], n_samples: int, draws: int = 1
    ) -> ActivationStore | None:
        """The store of a key if it holds anything, in memory or on disk."""
        name = store_name(key, shape, self.dtype, n_samples, draws)
        if name not in self._stores and not (self.directory / name / "store.json").exists():
            return None
        store = self.open(key, shape, n_samples, draws)
        return store if len(store) else None

    def room(self, store: ActivationStore | None, below: ActivationStore | None = None) -> Room:
        """Bytes free for new entries of `store`. Memory of `below` moves up with its samples; unused stores give way."""
        moves = 0 if below is None else below.stats.ram_bytes
        ram = self.ram.limit - self.ram.limit // 8 - self.ram.used + moves
        disk = self.disk.limit - sum(opened.disk.bytes for opened in self._stores.values())
        return Room(max(0, ram), max(0, disk), 0 if store is None else len(store))

    def keep_only(self, *stores: ActivationStore | None) -> None:
        """Remove the other stores opened here, with their files; those another process writes to are left to it."""
        for store in [store for store in self._stores.values() if store not in stores]:
            self._remove(store)

    def close(self, *, remove: bool = False) -> None:
        """Let go of every store. What is on disk stays for a later run, or goes with `remove`."""
        for store in list(self._stores.values()):
            if remove:
                self._remove(store)
            else:
                self._add(store)
                store.close()
                self._others[store.name] = store.disk.bytes
        self._stores.clear()

    def report(self) -> dict[str, Any]:
        """Budgets with peak and present use in bytes, counts over all stores opened so far, and the open stores."""
        total = StoreStats(**vars(self._past))
        for store in self._stores.values():
            _sum(total, store.stats)
        return {
            "directory": str(self.directory),
            "dtype": self.dtype,
            "ram": {"limit": self.ram.limit, "used": self.ram.used, "peak": self.ram.peak},
            "disk": {"limit": self.disk.limit, "used": self.disk.used, "peak": self.disk.peak},
            **{name: getattr(total, name) for name in ("hits", "misses", "spills", "dropped", "damaged")},
            "evicted": self._evicted,
            "stores": {
                name: {"boundary": store.key.get("boundary"), **asdict(store.stats)}
                for name, store in self._stores.items()
            },
        }

    def _remove(self, store: ActivationStore) -> None:
        self._add(store)
        self._stores.pop(store.name)
        try:
            store.clear()
        except CacheInUseError:
            self._others[store.name] = store.disk.bytes
        store.close()

    def _add(self, store: ActivationStore) -> None:
        _sum(self._past, store.stats)

    def _make_room(self, count: int) -> None:
        """Remove stores that nobody has open until `count` bytes are free, the one used longest ago first."""
        for info in list_stores(self.directory):
            if count <= 0 or info.name in self._stores:
                continue
            try:
                remove_store(info.path)
            except CacheInUseError:
                continue
            freed = self._others.pop(info.name, 0)
            self.disk.give(freed)
            self._evicted += 1
            count -= freed


def free_bytes(directory: Path) -> int:
    """Free bytes of the disk on which a folder is or would be."""
    existing = next(
        folder for folder in [directory.absolute(), *directory.absolute().parents] if folder.is_dir()
    )
    return shutil.disk_usage(existing).free


def _sum(total: StoreStats, more: StoreStats) -> None:
    for name in ("hits", "misses", "spills", "dropped", "damaged"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
