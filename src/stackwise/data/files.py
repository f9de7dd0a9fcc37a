"""Finding files: paths and globs of the configuration, and the sources of the standard library."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from stackwise.config.errors import did_you_mean
from stackwise.data.errors import DataError

# Not prose written for a reader: tests, installed packages, tables and what the build generated.
_STDLIB_SKIPPED = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def find_files(key: str, names: Iterable[str]) -> tuple[Path, ...]:
    """The files behind paths and globs (`**` crosses folders): in the order written, each once.

    Matches of one glob are sorted by path. Raises: FileNotFoundError naming `key` and what exists
    nearby; DataError for a folder.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(os.path.abspath(Path(os.path.expanduser(name))))
        if path.is_file():
            found[path] = None
        elif path.is_dir():
            raise DataError(
                f"{key} names the folder {name!r}", hint=f"name its files, such as {str(path / '*.txt')!r}"
            )
        elif glob.has_magic(name):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            files = [match for match in matches if match.is_file()]
            if not files:
                raise FileNotFoundError(f"{key}: no file matches {name!r}{_nearby(path)}")
            found.update(dict.fromkeys(files))
        else:
            raise FileNotFoundError(f"{key}: there is no file {name!r}{_nearby(path)}")
    return tuple(found)


def stdlib_files(max_bytes: int) -> tuple[Path, ...]:
    """Leading Python sources of the running interpreter's standard library that hold `max_bytes`.

    Ordered by the hash of their names, so that any leading part of the list is a fair sample of the
    whole library. Empty files and files that are not UTF-8 are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _STDLIB_SKIPPED and not f.startswith("config-")]
        names += [
            Path(folder, file).relative_to(root).as_posix()
            for file in files
            if file.endswith(".py") and not file.startswith("_sysconfigdata")
        ]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen: list[Path] = []
    total = 0
    for name in names:
        if total >= max_bytes:
            break
        data = (root / name).read_bytes()
        if data and _is_utf8(data):
            chosen.append(root / name)
            total += len(data)
    if not chosen:
        raise FileNotFoundError(
            f"data.source stdlib: {root} holds no Python sources; set data.source=text and data.path=FILE"
        )
    return tuple(chosen)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _nearby(path: Path) -> str:
    """What stands next to a path that does not exist, for an error message."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"; the folder {str(path.parent)!r} does not exist, {_listing(folder)}"
    near = did_you_mean(path.name, [entry.name for entry in folder.iterdir()])
    return f"; {near} {_listing(folder)}" if near else f"; {_listing(folder)}"


def _listing(folder: Path) -> str:
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(entries[:6]) + (f" and {len(entries) - 6} more" if len(entries) > 6 else "")
    return f"{str(folder)!r} holds {shown or 'nothing'}"
