"""Commits that go from one place to another: to another store, or to a folder of plain files and back.

An exported folder holds, besides what its caller adds,

    <step>-<hash16>.json     the manifest, as it was in the store
    <part>.safetensors       one file per part, the bytes of its object (`stack:s0/weights` -> stack.s0.weights)
    SHA256SUMS               hashes of all files, for `sha256sum -c SHA256SUMS`

so that it can be read by any safetensors reader, checked without this program, and brought back bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from stackwise.checkpoint import files
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import FILE_NAME, Commit, Part, parse
from stackwise.checkpoint.store import Store
from stackwise.storage import ops
from stackwise.storage.regular import check_file_name
from stackwise.storage.sums import write_sums
from stackwise.storage.tensors import Encoded, decode

Read = Callable[[Part], bytearray]


def file_of(part: str) -> str:
    """Name of a part's file in an exported folder."""
    return check_file_name(part.replace(":", ".").replace("/", ".") + ".safetensors", f"part {part!r}")


def share(source: Store, commit: Commit, target: Store) -> bool:
    """Give `target` the objects of a commit of `source`, each read and checked: as second names of the same files where
    the file system can, else as copies. True for names. Raises CheckpointError for a damaged object."""
    linked = True
    source.verify(commit)
    with target.writing():
        for part in commit.parts.values():
            if not target.objects.link(part, source.objects.path(part.sha256)):
                linked = False
                _put(target, part, source.read(commit, part))
        target.objects.sync({part.sha256 for part in commit.parts.values()})
    return linked


def take(target: Store, name: str, text: bytes, read: Read) -> Commit:
    """Bring a commit into a store: its manifest `text`, called `name`, and its parts as `read` gives their bytes.

    Raises CheckpointError, the manifest unwritten, where the bytes are not those that the manifest lists.
    """
    try:
        commit, _ = parse(target.manifests.folder / check_file_name(name, "the manifest"), text, 0.0)
    except ValueError as error:
        raise CheckpointError(f"the manifest {name} is damaged: {error}") from error
    with target.writing():
        for part in commit.parts.values():
            _put(target, part, read(part))
        target.objects.sync({part.sha256 for part in commit.parts.values()})
        ops.crashpoint("objects.durable")
        path = target.manifests.folder / name
        files.write_atomic(path, [text], tmp_dir=target.tmp, kind="manifest")
        files.sync_dir(path.parent)
        target.refs.write_latest(commit.id)
    return target.find(commit.id)


def _put(target: Store, part: Part, buffer: bytearray) -> None:
    digest = hashlib.sha256(buffer).hexdigest()
    if len(buffer) != part.bytes or digest != part.sha256:
        raise CheckpointError(
            f"part {part.name!r} has {len(buffer):,} bytes with SHA-256 {digest}, its manifest lists {part.bytes:,} with "
            f"{part.sha256}: the file is damaged, or belongs to another commit. Copy it again",
            part=part.name,
        )
    try:
        decode(buffer)
    except ValueError as error:
        raise CheckpointError(f"part {part.name!r}: {error}", part=part.name) from error
    target.objects.put(Encoded([memoryview(buffer)], part.sha256, part.bytes, part.tensors), [])


def write_folder(store: Store, commit: Commit, folder: Path, extra: Mapping[str, bytes]) -> None:
    """Fill an empty folder with a commit and the files in `extra`; see the module's text. Raises CheckpointError."""
    manifest = files.read(commit.path, files.size_of(commit.path) or 0)
    written = dict(extra) | {commit.path.name: bytes(manifest)}
    for name, content in written.items():
        ops.write_new(folder / name, [content], kind="export")
    for part in commit.parts.values():
        name = file_of(part.name)
        if name in written:
            raise CheckpointError(f"{commit.id} would need two files of the name {name}", part=part.name)
        written[name] = b""
        ops.write_new(folder / name, [store.read(commit, part)], kind="export")
    write_sums(folder)


def manifest_of(folder: Path) -> Path:
    """The manifest in an exported folder. Raises CheckpointError where there is none, or several."""
    names = [name for name in files.names(folder) if FILE_NAME.fullmatch(name)]
    if len(names) != 1:
        raise CheckpointError(
            f"{folder} holds {len(names)} manifests (STEP-HASH.json), and an exported commit has one. `stackwise ckpt "
            "export RUN COMMIT FOLDER` makes one; `stackwise import` takes model folders of the Hugging Face format",
            path=folder,
        )
    return folder / names[0]


def read_file(path: Path, most: int) -> bytearray:
    """The bytes of a regular file; CheckpointError where it is missing, a link, or larger than `most`."""
    size = files.size_of(path)
    if size is None or size > most:
        what = "is missing" if size is None else f"has {size:,} bytes, expected {most:,} at most"
        raise CheckpointError(f"{path} {what}; copy the folder again", path=path)
    return files.read(path, size)
