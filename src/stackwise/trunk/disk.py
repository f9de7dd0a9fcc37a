"""The entries of one store on disk, written by one process at a time and read through memory maps."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stackwise.storage import ops
from stackwise.storage.lock import FileLock
from stackwise.trunk import files
from stackwise.trunk.budget import Budget
from stackwise.trunk.errors import CacheError
from stackwise.trunk.layout import (
    RECORD,
    Header,
    Index,
    file_size,
    folder_bytes,
    read_index,
    record,
    shard_path,
)
from stackwise.trunk.listing import remove_store

Bytes = npt.NDArray[np.uint8]

FLUSH_BYTES = 64 * 2**20
"""Bytes after which the index is brought up to date."""
_OPEN_SHARDS = 64


class DiskStore:
    """Raw bytes by entry; see `layout` for the files. Nothing is created before the first `put`.

    While another process writes to the folder, its entries of that moment can be read and nothing is added.
    `bytes` are those of all files of the folder, as soon as they are flushed.
    """

    def __init__(self, folder: Path, budget: Budget, *, verify: bool = True) -> None:
        self.folder, self.budget, self.verify = folder, budget, verify
        self.header: Header | None = None
        self.damaged = 0
        self.bytes = 0
        self._lock = FileLock(folder / "LOCK")
        self._closed = False  # for further entries
        self._entries: Index = {}
        self._checked: set[int] = set()
        self._slots = self._records = 0
        self._pending: list[tuple[int, int, int]] = []
        self._fds: OrderedDict[Path, int] = OrderedDict()
        self._maps: OrderedDict[int, Bytes] = OrderedDict()
        self._guard = threading.RLock()  # entries are also read ahead, by another thread
        if (folder / "store.json").exists():
            self._open()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: int) -> bool:
        return entry in self._entries

    # --- writing -----------------------------------------------------------------------------------------------

    def put(self, entry: int, raw: Bytes, header: Header) -> bool:
        """Keep the bytes of an entry; False where there is no room or no right to write."""
        with self._guard:
            if self._closed or not (self._lock.held or self._create(header)):
                return False
            assert self.header is not None
            assert raw.nbytes == self.header.entry_bytes
            cost = raw.nbytes + RECORD.size
            if not self.budget.take(cost):
                self._closed = True  # nothing is freed before this store goes, and asking each time is dear
                return False
            slot, crc = self._slots, zlib.crc32(raw.data)
            shard, at = self.header.place(slot)
            try:
                ops.pwrite_all(self._fd(shard_path(self.folder, shard)), raw.data, at)
            except OSError as error:
                self.budget.give(cost)
                self._stop(error)
                return False
            self.bytes += cost
            self._slots += 1
            self._entries[entry] = (slot, crc)
            self._checked.add(entry)
            self._pending.append((entry, slot, crc))
            if len(self._pending) * raw.nbytes >= FLUSH_BYTES:
                self.flush()
            return True

    def flush(self) -> None:
        """Make everything written so far durable: entries first, then their records."""
        with self._guard:
            pending, self._pending = self._pending, []
            if not pending:
                return
            assert self.header is not None
            try:
                for shard in sorted({self.header.place(slot)[0] for _, slot, _ in pending}):
                    ops.fsync(self._fd(shard_path(self.folder, shard)))
                index = self._fd(self.folder / "index.bin")
                ops.pwrite_all(index, b"".join(record(*p) for p in pending), self._records * RECORD.size)
                ops.fsync(index)
                ops.sync_dir(self.folder)
            except OSError as error:
                for entry, _, _ in pending:  # nobody knows whether their bytes will reach the disk
                    self._entries.pop(entry, None)
                self._stop(error)
            else:
                self._records += len(pending)

    def _create(self, header: Header) -> bool:
        """Begin the store; False where another process has, or where not even the header finds room."""
        text = header.to_json()
        self._closed = True
        try:
            ops.make_dir(self.folder, 0o700)
            if not self._lock.acquire():
                return False
            if (self.folder / "store.json").exists() or not self.budget.take(len(text)):
                self._lock.release()
                return False
            ops.replace_text(self.folder / "store.json", text)
        except OSError as error:
            self._stop(error)
            return False
        self.header, self.bytes, self._closed = header, len(text), False
        return True

    def _stop(self, error: OSError) -> None:
        """Write no more: what finds no place is computed again. Raises CacheError unless it is only the space."""
        self._closed = True
        if error.errno not in ops.NO_SPACE:
            raise CacheError(
                f"cannot write activations to {self.folder} ({error.strerror or error}). Check the disk and the "
                "permissions, choose another training.progressive.cache_dir, or set "
                "training.progressive.cache_activations=false",
                path=self.folder,
            ) from error
        warnings.warn(
            f"no space left for activations in {self.folder}: the rest is computed again at every visit",
            RuntimeWarning,
            stacklevel=3,
        )

    def _fd(self, path: Path) -> int:
        if path not in self._fds:
            if len(self._fds) >= _OPEN_SHARDS:
                _, oldest = self._fds.popitem(last=False)
                ops.fsync(oldest)
                os.close(oldest)
            self._fds[path] = files.open_file(path, create=True)
        return self._fds[path]

    # --- reading -----------------------------------------------------------------------------------------------

    def get(self, entry: int, out: Bytes) -> bool:
        """Copy an entry into `out`. One whose bytes have changed on the disk is forgotten, with a warning: False."""
        with self._guard:
            if entry not in self._entries:
                return False
            slot, crc = self._entries[entry]
            view = self._view(slot)
            if view is not None:
                out[:] = view
                if not self.verify or entry in self._checked or zlib.crc32(out.data) == crc:
                    self._checked.add(entry)
                    return True
            self._forget(entry, slot)
            return False

    def _view(self, slot: int) -> Bytes | None:
        """The bytes of a slot in a mapped shard; null where the file is too short."""
        assert self.header is not None
        shard, start = self.header.place(slot)
        end = start + self.header.entry_bytes
        mapped = self._maps.get(shard)
        if mapped is None or mapped.size < end:  # it has grown
            mapped = self._maps[shard] = _map(shard_path(self.folder, shard))
            if len(self._maps) > _OPEN_SHARDS:  # each holds a descriptor
                self._maps.popitem(last=False)
        self._maps.move_to_end(shard)
        return mapped[start:end] if mapped.size >= end else None

    def _forget(self, entry: int, slot: int) -> None:
        assert self.header is not None
        del self._entries[entry]
        self.damaged += 1
        shard, at = self.header.place(slot)
        warnings.warn(
            f"{shard_path(self.folder, shard)} is damaged at byte {at}: the activations of sample "
            f"{entry % self.header.n_samples} are computed again. `stackwise cache verify` checks the rest",
            RuntimeWarning,
            stacklevel=3,
        )

    # --- opening and ending ------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Read header and index; with the right to write, cut off what a dead writer left behind."""
        try:
            writes = self._lock.acquire()
        except OSError:  # a disk that is read-only, or has no locks
            writes = False
        self._closed = not writes
        try:
            self.header = header = Header.read(self.folder)
            self._entries, self.damaged, self._records = read_index(self.folder, header)
        except BaseException:
            self._lock.release()
            raise
        sizes: dict[int, int] = {}
        for entry, (slot, _) in list(self._entries.items()):
            shard, at = header.place(slot)
            if shard not in sizes:
                sizes[shard] = file_size(shard_path(self.folder, shard))
            if sizes[shard] < at + header.entry_bytes:
                del self._entries[entry]
                self.damaged += 1
        self._slots = 1 + max((slot for slot, _ in self._entries.values()), default=-1)
        if writes:
            self._cut(header)
            os.utime(self.folder / "store.json")  # it was used now; the oldest are evicted first
        self.bytes = folder_bytes(self.folder)
        self.budget.charge(self.bytes)

    def _cut(self, header: Header) -> None:
        last, end = header.place(self._slots)
        for path in self.folder.glob("shard-*.bin"):
            number = int(path.stem.removeprefix("shard-"))
            if number > last or (number == last and not end):
                ops.unlink(path)
            elif number == last and file_size(path) > end:
                files.cut(path, end)
        if file_size(self.folder / "index.bin") > self._records * RECORD.size:
            files.cut(self.folder / "index.bin", self._records * RECORD.size)

    def close(self) -> None:
        """Make everything durable and let go of the files; the entries stay on disk."""
        with self._guard:
            self.flush()
            self._let_go()
            self._lock.release()
            self._closed = True

    def clear(self) -> None:
        """Remove the folder. Raises CacheInUseError while another process writes to it."""
        with self._guard:
            if self.header is None:
                return
            self._let_go()
            self._lock.release()
            remove_store(self.folder)
            self.budget.give(self.bytes)
            self.header, self.bytes, self._slots, self._records = None, 0, 0, 0
            self._entries, self._checked, self._pending = {}, set(), []
            self._closed = False

    def _let_go(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._maps.clear()


def _map(path: Path) -> Bytes:
    """The bytes of a file, mapped."""
    if not (size := file_size(path)):
        return np.empty(0, np.uint8)
    fd = files.open_file(path)
    try:
        return np.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_READ), np.uint8)
    finally:
        os.close(fd)
