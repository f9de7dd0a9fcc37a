"""From exceptions to what the user reads and to the exit code."""

from __future__ import annotations

import errno
import os
from typing import Any

import typer

from stackwise.config.errors import ConfigError

GENERAL, USAGE, DAMAGED, NO_SPACE, INTERRUPTED = 1, 2, 3, 6, 130


class UsageError(ValueError):
    """Arguments of the command line that do not fit together; the message holds the way out."""


def exit_code(error: BaseException) -> int:
    """The stable exit code of an error: its own `exit_code` where it has one, else that of its kind."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NO_SPACE
    if isinstance(error, OSError) and error.errno == errno.EIO:
        return DAMAGED
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return USAGE
    if isinstance(error, _damage()):
        return DAMAGED
    return USAGE if isinstance(error, _mistakes()) else GENERAL


def is_known(error: BaseException) -> bool:
    """Whether the message says what went wrong, so that a traceback would add nothing."""
    return exit_code(error) != GENERAL or _is_out_of_memory(error)


def explain(error: BaseException) -> str:
    """One message: what is wrong, and the way out."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted"
    if exit_code(error) > 128:
        return str(error)  # stopped as asked, which is no error
    if hasattr(error, "format_message"):  # typer's own, about options and arguments
        if type(error).__name__ == "NoArgsIsHelpError":
            return str(error.format_message())
        context = getattr(error, "ctx", None)
        where = f"\nSee `{context.command_path} --help`." if context is not None else ""
        message = _worded(error)
        if message.startswith("No such command") and context is not None and "Did you mean" not in message:
            message += f"; there are {', '.join(context.command.list_commands(context))}"
        return f"error: {message}{where}"
    if _is_out_of_memory(error) and type(error).__name__ != "OutOfMemory":  # a run's own says more
        return (
            f"error: out of memory ({_first_line(error)}). Lower training.batch_size (raise "
            "training.gradient_accumulation_steps to make up for it), or set training.gradient_checkpointing=true"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"error: {_os_text(error)}"
    name = "" if is_known(error) else f"{type(error).__name__}: "
    return f"error: {name}{error}"


def _worded(error: Any) -> str:
    """typer's message. On a value of the wrong type it is pydantic's, which may leave the value out."""
    from pydantic import ValidationError

    message = str(error.format_message()).replace("Value error, ", "").removesuffix(".")
    if not isinstance(error.__cause__, ValidationError):
        return message
    value = repr(error.__cause__.errors()[0]["input"])
    return message if value in message else f"{message}, got {value}"


def _os_text(error: OSError) -> str:
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    hints = {
        errno.ENOSPC: "free some space, or set checkpoint.dir to a folder on another disk",
        errno.EDQUOT: "free some space, or set checkpoint.dir to a folder on another disk",
        errno.EIO: "the disk fails: check it, then run the same command again or choose another path",
        errno.EACCES: "change its permissions, or choose another path",
        errno.EROFS: "choose a path on a disk that can be written",
        errno.EISDIR: "name a file in it",
        errno.ENOTDIR: "a part of this path is a file; choose another path",
        errno.ENOENT: "check the spelling, or make it",
    }
    hint = hints.get(error.errno or 0)
    return f"{place}{error.strerror}" + (f"; {hint}" if hint else "")


def _mistakes() -> tuple[type[BaseException], ...]:
    """What the user can put right in the command or the configuration."""
    from stackwise.data.errors import DataError
    from stackwise.tracking.folder import RunFolderError

    paths = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)
    return (ConfigError, UsageError, DataError, RunFolderError, *paths)


def _damage() -> tuple[type[BaseException], ...]:
    from stackwise.data.errors import DamagedDataError
    from stackwise.tracking.metrics import MetricsError

    return DamagedDataError, MetricsError


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises a plain RuntimeError when the processor's memory is used up.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
