"""Opening files that somebody else may have put there: regular files only, no links, bounded JSON."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from stackwise.storage.errors import DamagedFileError, UnsafeInputError

MAX_JSON = 64 * 2**20
PICKLES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".joblib",
    ".npy",
    ".npz",
    ".metadata",
    ".distcp",
    ".h5",
)
"""Endings of files that hold tensors as a pickle, or as what can hold one. None of them is ever opened."""

_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


def check_file_name(name: object, where: str) -> str:
    """The name of a file that lies directly in a folder; anything else (`../x`, `/x`, `a\\b`) is UnsafeInputError."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or name in (".", ".."):
        raise UnsafeInputError(
            f"{where} names {name!r:.200}, which is no file of the folder: only letters, digits and . _ - are allowed"
        )
    return name


def open_regular(path: Path) -> int:
    """Descriptor of a regular file, for reading.

    The folder is opened first and the name looked up in it, without following a link. Links, pipes and devices are
    UnsafeInputError; a link that the cache of the Hugging Face hub made, into its own blobs, is followed.
    """
    path = blob_of(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # O_NONBLOCK: a pipe in the file's place must not hang the reader.
        fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise UnsafeInputError(f"{path} is a link, which is not followed; name the file itself") from None
        if error.errno == errno.ENXIO:
            raise UnsafeInputError(f"{path} is no regular file") from None
        error.filename = str(path)
        raise
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnsafeInputError(f"{path} is no regular file")
    return fd


def blob_of(path: Path) -> Path:
    """What a link of the Hugging Face cache stands for: `snapshots/REVISION/NAME` -> `blobs/HASH`. Else the path."""
    if path.is_symlink() and path.parent.parent.name == "snapshots":
        target = Path(os.path.realpath(path))
        if target.parent == Path(os.path.realpath(path.parent.parent.parent)) / "blobs":
            return target
    return path


def refuse_pickles(folder: Path, wanted: str) -> None:
    """Raise UnsafeInputError where `wanted` is not in the folder and pickles are."""
    if (folder / wanted).is_file():
        return
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
    if found:
        raise UnsafeInputError(
            f"{folder} holds its weights as {found[0]}, a pickle: loading one can run any code, so it is refused. "
            "Convert it where you trust it, for example by AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; numbers are finite and no name is given twice.

    Raises FileNotFoundError, DamagedFileError for what is no JSON object, UnsafeInputError for the rest.
    """
    fd = open_regular(path)
    with open(fd, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnsafeInputError(f"{path} is larger than {limit:,} bytes, too large for a description")
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that some bytes are; see `read_json`."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique_names,
            parse_constant=_refuse_number,
            parse_float=_finite,
        )
    except UnsafeInputError as error:
        raise UnsafeInputError(f"{where}: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"{where} is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        raise UnsafeInputError(f"{where} is no plain JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{where} holds a {type(value).__name__}, not an object")
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. The first or the last of two equal names: readers disagree, so it is refused."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UnsafeInputError(f"{twice!r:.200} is given twice")
    return fields


def folder_risks(path: Path) -> list[str]:
    """Why somebody else may change what is in a folder, or have put it there; a folder that is not there is safe."""
    risks = []
    if path.is_symlink():
        risks.append(f"{path} is a link to {os.path.realpath(path)}")
    if path.exists():
        facts = path.stat()
        if facts.st_uid != os.geteuid():
            risks.append(f"{path} belongs to the user {facts.st_uid}, not to you ({os.geteuid()})")
        if facts.st_mode & stat.S_IWOTH:
            risks.append(f"{path} can be written by everybody; `chmod o-w` changes that")
        elif facts.st_mode & stat.S_IWGRP and facts.st_gid != os.getegid():
            risks.append(f"{path} can be written by the group {facts.st_gid}; `chmod g-w` changes that")
    return risks


def _refuse_number(text: str) -> NoReturn:
    raise UnsafeInputError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise UnsafeInputError(f"{text:.80} is too large for a number")
    return value
