"""A disk that loses what was not synced: the operations of a program recorded, and the states a power loss may leave.

The rules are those of POSIX read strictly, weaker than any file system in use:

- What was written to a file is safe after an fsync of that file; before, each write by itself may be there, be missing, be
  there in part (0, 512 or 4,096 bytes of it), or have left zeros of its length.
- A new, changed or removed name is safe after an fsync of its folder; before, each by itself may be there or missing. A
  rename is two such changes, a name that appears and one that goes, so also half of it may be there.
- So everything that was not synced may come to the disk in any order.

After ALICE (Pillai et al., OSDI 2014) and the crash tests of SQLite.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stackwise.storage import ops

PRIMITIVES = (
    *("create", "open_to_change", "write", "pwrite", "fsync", "rename", "link", "unlink", "truncate"),
    *("mkdir", "rmdir"),
)
"""Functions of `stackwise.storage.ops` that change something on a disk; all others call them."""
TEARS = (0, 512, 4096)
"""Bytes of a torn write that are there."""
IDLE = ("sync", "mark")
"""Ops that change nothing."""
KEPT, LOST, ZEROS = "kept", "lost", "zeros"


@dataclass(frozen=True)
class Op:
    """One change. `node`: the file or folder that it changes, and that an fsync makes safe."""

    kind: str
    """write, truncate, add (of a name), drop (of a name), sync, or mark (something that was promised by then)."""
    node: int
    name: str = ""
    target: int = 0
    """The node that an added name leads to."""
    offset: int = 0
    data: bytes = b""


@dataclass
class Trace:
    """What a program did below `root`. Node 0 is `root`, which was there and safe before."""

    root: Path
    ops: list[Op] = field(default_factory=list)
    safe_at: dict[int, int] = field(default_factory=dict)
    """Op -> the number of ops after which it is safe, the last of them a sync; what never became safe is missing."""
    folders: set[int] = field(default_factory=lambda: {0})

    def unsafe(self, end: int) -> list[int]:
        """The ops before `end` that a power loss at that point may take."""
        return [i for i in range(end) if self.safe_at.get(i, end + 1) > end and self.ops[i].kind not in IDLE]


class Recorder:
    """While active, everything that `stackwise.storage.ops` changes below `root` is written down."""

    def __init__(self, root: Path) -> None:
        self.trace = Trace(root)
        self._nodes: dict[int, int] = {root.stat().st_ino: 0}
        self._open: dict[int, int] = {}
        self._position: dict[int, int] = {}
        self._next = 1
        self._stack = contextlib.ExitStack()

    def mark(self, name: str) -> None:
        """Note that something is promised from here on."""
        self.trace.ops.append(Op("mark", -1, name))

    def __enter__(self) -> Recorder:
        for name in PRIMITIVES:
            self._replace(name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replace(self, name: str, wrapped: Callable[..., Any]) -> None:
        original = getattr(ops, name)
        self._stack.enter_context(patch.object(ops, name, lambda *a, **k: wrapped(original, *a, **k)))

    def _inside(self, path: Path) -> bool:
        return path.is_relative_to(self.trace.root)

    def _node(self, path: Path) -> int:
        return self._nodes[path.lstat().st_ino]

    def _add(self, kind: str, node: int, **fields: Any) -> None:
        self.trace.ops.append(Op(kind, node, **fields))

    def _appear(self, path: Path, folder: bool = False) -> int:
        # Real numbers of files are used again by the disk; ours are not.
        node, self._next = self._next, self._next + 1
        self._nodes[path.lstat().st_ino] = node
        if folder:
            self.trace.folders.add(node)
        self._add("add", self._node(path.parent), name=path.name, target=node)
        return node

    def _create(self, original: Callable[..., int], path: Path, *rest: Any, **more: Any) -> int:
        fd = original(path, *rest, **more)
        if self._inside(path):
            self._open[fd], self._position[fd] = self._appear(path), 0
        else:
            self._open.pop(fd, None)
        return fd

    def _open_to_change(self, original: Callable[..., int], path: Path, *rest: Any, **more: Any) -> int:
        new = not os.path.lexists(path)
        fd = original(path, *rest, **more)
        self._open.pop(fd, None)
        if self._inside(path):
            self._open[fd], self._position[fd] = self._appear(path) if new else self._node(path), 0
        return fd

    def _write(self, original: Callable[..., int], fd: int, data: memoryview) -> int:
        done = original(fd, data)
        if fd in self._open:
            self._add("write", self._open[fd], offset=self._position[fd], data=bytes(data[:done]))
            self._position[fd] += done
        return done

    def _pwrite(self, original: Callable[..., int], fd: int, data: memoryview, offset: int) -> int:
        done = original(fd, data, offset)
        if fd in self._open:
            self._add("write", self._open[fd], offset=offset, data=bytes(data[:done]))
        return done

    def _truncate(self, original: Callable[..., None], fd: int, size: int) -> None:
        original(fd, size)
        if fd in self._open:
            self._add("truncate", self._open[fd], offset=size)

    def _fsync(self, original: Callable[..., None], fd: int) -> None:
        original(fd)
        node = self._nodes.get(os.fstat(fd).st_ino)
        if node is not None:
            self._add("sync", node)
            for index, op in enumerate(self.trace.ops[:-1]):
                if op.node == node:
                    self.trace.safe_at.setdefault(index, len(self.trace.ops))

    def _rename(self, original: Callable[..., None], source: Path, target: Path) -> None:
        node = self._node(source) if self._inside(source) else None
        original(source, target)
        if node is not None:
            self._add("add", self._node(target.parent), name=target.name, target=node)
            self._add("drop", self._node(source.parent), name=source.name)

    def _link(self, original: Callable[..., None], source: Path, target: Path) -> None:
        original(source, target)
        if self._inside(target):
            self._add("add", self._node(target.parent), name=target.name, target=self._node(source))

    def _unlink(self, original: Callable[..., None], path: Path) -> None:
        original(path)
        if self._inside(path):
            self._add("drop", self._node(path.parent), name=path.name)

    def _rmdir(self, original: Callable[..., None], path: Path) -> None:
        self._unlink(original, path)

    def _mkdir(self, original: Callable[..., None], path: Path, *rest: Any, **more: Any) -> None:
        original(path, *rest, **more)
        if self._inside(path):
            self._appear(path, folder=True)


Choice = dict[int, str]
"""Fate of each op that was not safe: KEPT, LOST, ZEROS, or the number of bytes that are there."""


@dataclass(frozen=True)
class State:
    """What is on the disk after a power loss: file -> bytes, and the folders."""

    end: int
    """Ops that had been done."""
    choice: tuple[tuple[int, str], ...]
    files: dict[str, bytes]
    folders: frozenset[str]

    @property
    def key(self) -> bytes:
        """Equal for equal contents."""
        whole = hashlib.blake2b(digest_size=16)
        for name in sorted(self.folders | self.files.keys()):
            data = self.files.get(name)
            whole.update(name.encode() + (b"/" if data is None else hashlib.blake2b(data).digest()))
        return whole.digest()


def after(trace: Trace, end: int, choice: Choice) -> State:
    """The disk after a power loss at op `end`, when what was not safe met with `choice`."""
    names: dict[int, dict[str, int]] = {folder: {} for folder in trace.folders}
    contents: dict[int, bytearray] = {}
    for index, op in enumerate(trace.ops[:end]):
        fate = choice.get(index, KEPT)
        if fate == LOST or op.kind in IDLE:
            continue
        if op.kind == "add":
            names[op.node][op.name] = op.target
        elif op.kind == "drop":
            names[op.node].pop(op.name, None)
        elif op.kind == "truncate":
            held = contents.setdefault(op.node, bytearray())
            held[:] = held[: op.offset].ljust(op.offset, b"\0")
        else:
            data = bytes(len(op.data)) if fate == ZEROS else op.data if fate == KEPT else op.data[: int(fate)]
            held = contents.setdefault(op.node, bytearray())
            if data:
                held.extend(bytes(max(0, op.offset - len(held))))
                held[op.offset : op.offset + len(data)] = data
    files: dict[str, bytes] = {}
    folders = set()
    open_ = [("", 0)]
    while open_:
        prefix, folder = open_.pop()
        for name, node in names[folder].items():
            if node in trace.folders:
                folders.add(prefix + name)
                open_.append((f"{prefix}{name}/", node))
            else:
                files[prefix + name] = bytes(contents.get(node, b""))
    return State(end, tuple(sorted(choice.items())), files, frozenset(folders))


def choices(trace: Trace, end: int, draw: random.Random, samples: int) -> Iterator[Choice]:
    """Fates of the unsafe ops at `end`: none or all lost, each one alone lost, kept or torn, then `samples` at random."""
    unsafe = trace.unsafe(end)
    yield {}
    if not unsafe:
        return
    lost = dict.fromkeys(unsafe, LOST)
    yield lost
    for index in unsafe:
        for fate in _fates(trace.ops[index]):
            yield {index: fate}
            yield {**lost, index: fate}
        yield {**lost, index: KEPT}
    for _ in range(samples if len(unsafe) > 1 else 0):
        share = draw.choice((0.1, 0.5, 0.9))
        yield {index: draw.choice(_fates(trace.ops[index])) for index in unsafe if draw.random() > share}


def _fates(op: Op) -> Sequence[str]:
    """How an op can go wrong."""
    if op.kind != "write":
        return (LOST,)
    return (LOST, ZEROS, *(str(tear) for tear in TEARS if tear < len(op.data)))


class Folder:
    """A real folder that is made to hold one state after the other; contents are linked, not copied."""

    def __init__(self, root: Path, pool: Path) -> None:
        self.root, self._pool = root, pool
        root.mkdir()
        pool.mkdir()
        self._files: dict[str, bytes] = {}
        self._folders: set[str] = set()

    def show(self, state: State) -> None:
        """Make the folder hold this state and nothing else."""
        wanted = {name: hashlib.blake2b(data, digest_size=16).digest() for name, data in state.files.items()}
        for name, key in list(self._files.items()):
            if wanted.get(name) != key:
                (self.root / name).unlink()
                del self._files[name]
        for name in sorted(self._folders - state.folders, reverse=True):
            (self.root / name).rmdir()
        for name in sorted(state.folders - self._folders):
            (self.root / name).mkdir()
        self._folders = set(state.folders)
        for name, key in wanted.items():
            if name not in self._files:
                held = self._pool / key.hex()
                if not held.exists():
                    held.write_bytes(state.files[name])
                    held.chmod(0o444)
                os.link(held, self.root / name)
                self._files[name] = key
