"""The stores in a folder, seen from outside: list, check, remove."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from stackwise.storage import ops
from stackwise.storage.lock import FileLock
from stackwise.trunk import files
from stackwise.trunk.errors import CacheError, CacheInUseError
from stackwise.trunk.layout import Header, file_size, folder_bytes, read_index, shard_path

_NAME = re.compile(r"b[0-9]{3,}-[0-9a-f]{24}")


@dataclass(frozen=True)
class StoreInfo:
    """A store as it lies on the disk. `used`: when a run last wrote to it, in seconds since 1970."""

    name: str
    path: Path
    bytes: int
    used: float
    header: Header | None
    entries: int
    damage: str = ""
    """Why the store cannot be used; empty for a whole one."""


def list_stores(directory: str | Path) -> list[StoreInfo]:
    """The stores in a folder, the one used longest ago first. Folders of other kinds do not count."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = []
    for path in sorted(directory.iterdir()):
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            try:
                found.append(_look_at(path))
            except FileNotFoundError:  # just removed by its run
                continue
    return sorted(found, key=lambda info: (info.used, info.name))


def _look_at(path: Path) -> StoreInfo:
    size = folder_bytes(path)
    try:
        header = Header.read(path)
        entries = len(read_index(path, header)[0])
    except FileNotFoundError:
        return StoreInfo(path.name, path, size, path.stat().st_mtime, None, 0, f"{path} holds no header")
    except CacheError as error:
        return StoreInfo(path.name, path, size, path.stat().st_mtime, None, 0, str(error))
    return StoreInfo(path.name, path, size, (path / "store.json").stat().st_mtime, header, entries)


def verify_store(folder: Path) -> tuple[int, list[str]]:
    """Read every entry: how many are whole, and what is damaged, each with its file. Raises CacheError for the header."""
    header = Header.read(folder)
    entries, bad, count = read_index(folder, header)
    damage = [f"{folder / 'index.bin'}: {bad} of {count} records"] if bad else []
    whole, size = 0, header.entry_bytes
    by_slot = sorted((slot, crc, entry % header.n_samples) for entry, (slot, crc) in entries.items())
    for shard, slots in groupby(by_slot, lambda row: row[0] // header.per_shard):
        path, hurt = shard_path(folder, shard), []
        if not path.exists():
            damage.append(f"{path} is missing")
            continue
        with open(files.open_file(path), "rb") as stream:
            for slot, crc, sample in slots:
                stream.seek(header.place(slot)[1])
                data = stream.read(size)
                if len(data) == size and zlib.crc32(data) == crc:
                    whole += 1
                else:
                    hurt.append(str(sample))
        if hurt:
            more = f" and {len(hurt) - 8} more" if len(hurt) > 8 else ""
            damage.append(f"{path}: activations of sample {', '.join(hurt[:8])}{more}")
    return whole, damage


def remove_store(folder: Path) -> int:
    """Delete the files of a store, the index first; bytes freed. Raises CacheInUseError while somebody writes to it."""
    lock = FileLock(folder / "LOCK")
    if not lock.acquire():
        raise CacheInUseError(
            f"{folder} is being written by another process; stop it or wait until it ends", path=folder
        )
    try:
        freed, names = (
            0,
            ["index.bin", *(path.name for path in folder.glob("shard-*.bin")), ".store.json.new"],
        )
        for path in [folder / name for name in (*names, "store.json", "LOCK")]:
            freed += file_size(path)
            ops.remove(path)
        if not any(folder.iterdir()):
            ops.rmdir(folder)
    finally:
        lock.release()
    return freed
