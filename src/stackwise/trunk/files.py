"""Files of the activation store: how they are opened and cut.

Entries are only named in an index once their bytes are on the disk. What changes the disk is in `storage.ops`.
"""

from __future__ import annotations

import os
from pathlib import Path

from stackwise.storage import ops


def open_file(path: Path, *, create: bool = False) -> int:
    """Descriptor of a regular file, links refused; with `create` for writing too."""
    if create:
        return ops.open_to_change(path, 0o600)
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def cut(path: Path, size: int) -> None:
    """Drop what a file holds after `size` bytes."""
    fd = open_file(path, create=True)
    try:
        ops.truncate(fd, size)
    finally:
        os.close(fd)
